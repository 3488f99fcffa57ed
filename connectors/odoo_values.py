"""Values as Odoo takes them, by the type of the field that they go into."""

import html
import re
from datetime import UTC, datetime

from connectors import Blocked
from connectors.odoo_doors import Failed


def as_odoo(name: str, kind: str, value: object) -> object:
    """`value` for the field `name`, whose type in Odoo is `kind`."""
    match kind, value:
        case ("datetime", datetime()) | ("datetime", str()):
            if (moment := _moment(value)) is not None:  # Odoo's are UTC, and have no zone
                return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
        case "date", str() if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
            return value
        case ("date", datetime()) | ("date", str()):
            if (moment := _moment(value)) is not None and moment.utcoffset():
                return moment.date().isoformat()
            raise Failed(
                Blocked(f"configuration: values: {name} is a day, and a time in UTC does not say which; keep a date")
            )
        case "boolean", bool():
            return value
        case (("integer" | "many2one"), int()) if not isinstance(value, bool):
            return value
        case (("integer" | "many2one"), str()) if re.fullmatch(r"-?[0-9]{1,18}", value):
            return int(value)
        case (("float" | "monetary"), (int() | float())) if not isinstance(value, bool):
            return value
        case (("float" | "monetary"), str()) if re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", value):
            return float(value)
        case (("char" | "text" | "selection"), (str() | int() | float())):
            return str(value)
        case "html", (str() | int() | float()):
            return html.escape(str(value))
        case _:
            pass
    raise Failed(Blocked(f"configuration: values: {name} is of type {kind}, which does not take what it is given"))


def same(kind: str, stands: object, wanted: object) -> bool:
    """Whether a field holds already what `as_odoo` made; what cannot be told is not the same."""
    match kind, stands:
        case "many2one", [int(id_), *_]:
            return id_ == wanted
        case (("float" | "monetary"), (int() | float())) if isinstance(wanted, int | float):
            return abs(stands - wanted) < 0.005
        case (("datetime" | "date" | "boolean" | "integer" | "char" | "text" | "selection"), _):
            return stands == wanted
        case _:
            return False


def _moment(value: object) -> datetime | None:
    """A naive one is UTC, as Odoo means it."""
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
