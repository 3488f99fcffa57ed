"""Proves that the program survives: injects faults into the real one, and compares what was promised with what is there.

    __main__.py   `make chaos`: the faults one by one, a row each, and the table in docs/explanation/resilience.md
    faults/       one file a kind of fault; each function in it that is marked with `@fault` is a row
    stage.py      one fault's stage: Postgres, gateways, dispatchers, partners, senders
    postgres.py   the Postgres that is killed, frozen and starved
    program.py    one `sluicegate serve`, started, killed and started again
    partner.py    partners in a process of their own, with moods
    proxy.py      a TCP proxy that delays, holds, cuts and resets
    load.py       senders that sign, and try again honestly
    sampler.py    looks at the books and at the processes each second
    ledger.py     what was sent, what arrived, what was disturbed: files outside the system
    checker.py    what the ledgers and the database must agree on; pure

No part of the product imports it, and it is not shipped.
"""
