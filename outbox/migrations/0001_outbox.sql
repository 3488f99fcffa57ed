-- runs_from: 0.1.0
-- The outbox.  Names are DESIGN's; the numbers in smallint columns are outbox.event.OutcomeKind and outbox.store.Tally.

-- The instant inside a UUID of version 7, and the day (UTC) that partitions and the books go by.
CREATE FUNCTION event_at(id uuid) RETURNS timestamptz LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN to_timestamp((('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint)::double precision / 1000);
CREATE FUNCTION event_day(id uuid) RETURNS date LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN (event_at(id) AT TIME ZONE 'UTC')::date;
-- The least UUID of version 7 of an instant: the bounds of partitions and of searches by time.
CREATE FUNCTION event_floor(at timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid;
-- A time in JSON: RFC 3339 in UTC, as everything that is kept.
CREATE FUNCTION rfc3339(at timestamptz) RETURNS text LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
RETURN to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"');

CREATE TABLE destinations (
    id          smallint    GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name        text        NOT NULL UNIQUE,
    shards      smallint    NOT NULL CONSTRAINT destinations_shards_positive CHECK (shards > 0),
    hash        text        NOT NULL DEFAULT 'blake2b-64' CONSTRAINT destinations_hash_known CHECK (hash = 'blake2b-64'),
    held_until  timestamptz,           -- null: open; infinity: until a person releases it
    held_by     text,                  -- who holds it: 'program', or a token's or person's name
    held_reason text,
    not_before  timestamptz,           -- back-off of the whole destination: breaker, Retry-After
    late_since  timestamptz,           -- since when what it is owed waits for longer than is expected; null: it does not
    CONSTRAINT destinations_hold_is_told CHECK ((held_until IS NULL) = (held_by IS NULL AND held_reason IS NULL))
);

CREATE TABLE dispatchers (
    -- by chance: a counter could give a number again that was given on a primary which is lost
    id          integer     PRIMARY KEY DEFAULT (random() * 2147483646)::integer,
    name        text        NOT NULL,  -- host:pid, for people
    started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease_until timestamptz NOT NULL,
    leaving     boolean     NOT NULL DEFAULT false, -- it takes no more lanes, and gives back those that it has
    destinations smallint[] NOT NULL DEFAULT '{}'   -- those that its configuration has: lanes are shared among who knows them
) WITH (fillfactor = 50);

-- A lane is a shard of a destination and has one owner at a time; the epoch fences the owner before.
CREATE TABLE lanes (
    lane        integer     GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    destination smallint    NOT NULL REFERENCES destinations,
    shard       smallint    NOT NULL,
    owner       bigint,
    epoch       bigint      NOT NULL DEFAULT 0,
    -- events below this were carried over before their partition was dropped; here, so that a settle's fence sees it
    carried_below uuid      NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    UNIQUE (destination, shard)
) WITH (fillfactor = 50);

-- A dispatcher is present while its process holds its advisory lock (class 20928, outbox.store.ALIVE) on this server,
-- and lives while its lease runs besides.
CREATE VIEW present_dispatchers AS
SELECT objid::bigint AS id
  FROM pg_locks
 WHERE locktype = 'advisory'
   AND classid = 20928
   AND objsubid = 2
   AND granted
   AND database = (SELECT oid FROM pg_database WHERE datname = current_database());
CREATE VIEW living_dispatchers AS
SELECT d.id, d.leaving, d.destinations
  FROM dispatchers AS d
 WHERE d.lease_until > clock_timestamp()
   AND d.id IN (SELECT id FROM present_dispatchers);

-- Destinations that somebody who lives delivers to.
CREATE VIEW served_destinations AS
SELECT DISTINCT destination FROM lanes WHERE owner IN (SELECT id FROM living_dispatchers);

-- Who serves, and by which configuration: written again every few seconds, gateways included.
CREATE TABLE processes (
    id      uuid        PRIMARY KEY,
    name    text        NOT NULL,  -- host:pid, for people
    role    text        NOT NULL,
    digest  text        NOT NULL,  -- of its configuration
    since   timestamptz NOT NULL DEFAULT clock_timestamp(),  -- it works by this configuration
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);

CREATE TABLE events (
    id             uuid        NOT NULL,
    source         text        NOT NULL,
    type           text        NOT NULL,
    subject        text,
    facility       text,
    time           timestamptz NOT NULL,
    received_at    timestamptz NOT NULL,
    traceparent    text,
    policy         text        NOT NULL,
    policy_version integer     NOT NULL,
    digest         uuid        NOT NULL,  -- keyed digest of the raw body, 128 bits
    owed           smallint[]  NOT NULL,  -- the destinations that its routes chose
    data           json        NOT NULL CONSTRAINT events_data_small CHECK (octet_length(data::text) <= 8192),
    CONSTRAINT events_pkey PRIMARY KEY (id)
) PARTITION BY RANGE (id);
CREATE INDEX events_subject ON events (subject, id) WHERE subject IS NOT NULL;
-- Events that still owe, or have a dead letter, when their partition's retention is over.
CREATE TABLE carried_events (LIKE events INCLUDING CONSTRAINTS INCLUDING INDEXES);

-- What two posts have in common when they are the same event.  `bucket` is where its partition begins.
CREATE TABLE dedup (
    bucket   timestamptz NOT NULL,
    key      uuid        NOT NULL,  -- keyed digest over source and key, 128 bits
    event_id uuid        NOT NULL,
    CONSTRAINT dedup_pkey PRIMARY KEY (bucket, key)
) PARTITION BY RANGE (bucket);

-- A row is here if and only if a delivery is outstanding.
CREATE TABLE pending (
    event_id   uuid        NOT NULL,
    due_at     timestamptz NOT NULL,
    owed_since timestamptz NOT NULL,
    key        bigint,                        -- hash of the subject, where order is asked for
    not_before timestamptz,                   -- in order: when to try again; due_at is its place in the queue and stays
    lane       integer     NOT NULL,
    give_up    integer,                       -- seconds; null: the destination's
    attempts   integer     NOT NULL DEFAULT 0, -- tries for life
    spared     integer     NOT NULL DEFAULT 0, -- of these, the ones that back-off does not count
    CONSTRAINT pending_only_ordered_wait_in_place CHECK (not_before IS NULL OR key IS NOT NULL)
) WITH (fillfactor = 90, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
        autovacuum_vacuum_cost_delay = 0, autovacuum_vacuum_insert_scale_factor = 0,
        autovacuum_vacuum_insert_threshold = 100000, autovacuum_analyze_scale_factor = 0,
        autovacuum_analyze_threshold = 50000);
CREATE UNIQUE INDEX pending_queue ON pending (lane, due_at, event_id);
CREATE UNIQUE INDEX pending_identity ON pending (event_id, lane);
CREATE INDEX pending_key ON pending (lane, key, due_at, event_id) WHERE key IS NOT NULL;

CREATE TABLE attempts (
    event_id    uuid        NOT NULL,
    at          timestamptz NOT NULL,
    trace_id    uuid,
    took_ms     integer     NOT NULL,
    destination smallint    NOT NULL,
    number      integer     NOT NULL,
    outcome     smallint    NOT NULL,
    status      smallint,
    reason      text,
    receipt     text,
    CONSTRAINT attempts_pkey PRIMARY KEY (event_id, destination, number)
) PARTITION BY RANGE (event_id);
CREATE TABLE carried_attempts (LIKE attempts INCLUDING CONSTRAINTS INCLUDING INDEXES);

CREATE TABLE dead_letters (
    event_id    uuid        NOT NULL,
    destination smallint    NOT NULL REFERENCES destinations,
    cause       text        NOT NULL,  -- destination:outcome:code, what they are grouped by
    outcome     smallint    NOT NULL,  -- of the last attempt
    status      smallint,
    reason      text        NOT NULL,
    attempts    integer     NOT NULL,
    died_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    lane        integer     NOT NULL,
    key         bigint,
    give_up     integer,
    CONSTRAINT dead_letters_pkey PRIMARY KEY (event_id, destination)
);
CREATE INDEX dead_letters_newest ON dead_letters (died_at, event_id);
CREATE INDEX dead_letters_cause ON dead_letters (cause, died_at);

-- Deliveries that will never be made, and why.
CREATE TABLE discards (
    event_id    uuid        NOT NULL,
    destination smallint    NOT NULL REFERENCES destinations,
    at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor       text        NOT NULL,
    reason      text        NOT NULL,
    cause       text        NOT NULL DEFAULT 'discarded'
                CONSTRAINT discards_cause_known CHECK (cause IN ('discarded', 'reassigned')),
    CONSTRAINT discards_pkey PRIMARY KEY (event_id, destination)
);

-- Deliveries that an event owes beside those that its routes chose: what a person sent elsewhere.
CREATE TABLE reassigned (
    event_id    uuid        NOT NULL,
    destination smallint    NOT NULL REFERENCES destinations,  -- where it goes now
    origin      smallint    NOT NULL REFERENCES destinations,  -- where it would have gone
    CONSTRAINT reassigned_pkey PRIMARY KEY (event_id, destination)
);

-- What an owner in careful mode is about to try: a row that outlives its owner counts as a kill.
CREATE TABLE suspects (
    event_id uuid     NOT NULL,
    lane     integer  NOT NULL,
    kills    smallint NOT NULL DEFAULT 1,
    PRIMARY KEY (event_id, lane)
);

-- The books: every statement that changes a state adds its sums here; rolled up in the background.
CREATE TABLE tally (
    day         date     NOT NULL,  -- of the event
    what        smallint NOT NULL,
    destination smallint NOT NULL,  -- 0 for what concerns the event
    n           bigint   NOT NULL
);
-- What a row-level proof (owed = ended + outstanding, id by id) found when a partition's days were over.
CREATE TABLE proofs (
    day       date        PRIMARY KEY,
    at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    events    bigint      NOT NULL,
    owed      bigint      NOT NULL,
    missing   bigint      NOT NULL,
    surplus   bigint      NOT NULL
);

-- Refusals at the door, summed by second; never a body.
CREATE TABLE rejections (
    at      timestamptz NOT NULL,
    source  text        NOT NULL,  -- empty where the caller named none of ours
    reason  text        NOT NULL,
    n       integer     NOT NULL,
    digests uuid[]      NOT NULL   -- a capped sample of keyed body digests
);
CREATE INDEX rejections_newest ON rejections (at);

-- Top-level keys that senders post and no policy names: what a privacy officer wants to know.
CREATE TABLE dropped_keys (
    source     text        NOT NULL,
    policy     text        NOT NULL,
    name       text        NOT NULL,
    n          bigint      NOT NULL,
    first_seen timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_seen  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (source, policy, name)
);

-- What each version of a policy stood for when it was first served: a changed policy needs a new number.
CREATE TABLE policies (
    name       text        NOT NULL,
    version    integer     NOT NULL,
    digest     uuid        NOT NULL,
    first_seen timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (name, version)
);

CREATE TABLE tokens (
    id         text        PRIMARY KEY,
    name       text        NOT NULL,
    role       text        NOT NULL,
    digest     bytea       NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE audit (
    id     bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor  text        NOT NULL,
    action text        NOT NULL,
    target text        NOT NULL,
    reason text        NOT NULL,
    detail json        NOT NULL
);

-- When each source last posted something proven, by facility ('' for what has none); the doors write it every few seconds.
CREATE TABLE heard (
    source   text        NOT NULL,
    facility text        NOT NULL,
    at       timestamptz NOT NULL,
    PRIMARY KEY (source, facility)
) WITH (fillfactor = 50);

-- When each secret of a source last verified something, by where it comes from (env:NAME, file:PATH); never the secret.
-- The doors write it once a minute at most, so that an old one can be retired.
CREATE TABLE secret_uses (
    source text        NOT NULL,
    origin text        NOT NULL,
    at     timestamptz NOT NULL,
    PRIMARY KEY (source, origin)
) WITH (fillfactor = 50);

-- Who is expected to post ('' for a source as a whole), and since when somebody watches over it without a break.
CREATE TABLE expectations (
    source        text        NOT NULL,
    facility      text        NOT NULL,
    terms         text        NOT NULL,  -- what is expected, in words: other terms begin anew
    watched_since timestamptz NOT NULL,
    watched_at    timestamptz NOT NULL,
    silent_since  timestamptz,           -- null: it is heard; else when it was heard last, or when the watch began
    PRIMARY KEY (source, facility)
) WITH (fillfactor = 50);

-- The numbers that a sender gives its messages: until when a source's events were counted,
CREATE TABLE counted_sources (
    source     text        PRIMARY KEY,
    field      text        NOT NULL,
    since      timestamptz NOT NULL,  -- events that were accepted before it do not count
    counted_to timestamptz NOT NULL
) WITH (fillfactor = 50);
-- what each of its facilities counts,
CREATE TABLE sequences (
    source   text   NOT NULL,
    facility text   NOT NULL,
    first    bigint NOT NULL,         -- all from the first to the last was seen, but what is missing
    last     bigint NOT NULL,
    began    uuid   NOT NULL,         -- the event that it began with: older ones belong to the count before
    latest   uuid   NOT NULL,         -- the newest event that was counted
    PRIMARY KEY (source, facility)
);
-- and what is missing in it: a gap stands until all of it is there.
CREATE TABLE sequence_gaps (
    source     text           NOT NULL,
    facility   text           NOT NULL,
    first      bigint         NOT NULL,
    last       bigint         NOT NULL,
    missing    int8multirange NOT NULL,
    noticed_at timestamptz    NOT NULL,
    told       boolean        NOT NULL,
    PRIMARY KEY (source, facility, first)
);

-- What the program has to say and has not made an event of yet; written by the statement that changes the state.
CREATE TABLE announcements (
    id       uuid        NOT NULL DEFAULT gen_random_uuid(),
    n        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    type     text        NOT NULL,
    subject  text        NOT NULL,
    facility text,
    data     json        NOT NULL
);
