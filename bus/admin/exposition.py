"""What a check found, in the words of monitors: a line for Nagios, metrics for Prometheus. Pure."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from bus.admin.checks import Checked, CheckName, Limit, Reading


def nagios(checked: Checked) -> str:
    """Return the line that a plugin prints: status, text, and numbers with their limits.

    The exit code of the plugin is `checked.status`.
    """
    text = checked.text.replace("|", "/")  # what follows it are numbers
    line = f"BUS {checked.check.upper()} {checked.status.name} - {text}"
    data = [part for reading in checked.readings for part in _data(checked, reading)]
    return f"{line} | {' '.join(data)}" if data else line


def _data(checked: Checked, reading: Reading) -> list[str]:
    name = f"{reading.topic}/{reading.group}"
    data = [_datum(name, f"{reading.value}", _ranges(checked, reading.unit))]
    if reading.unit != "workers":
        age = f"{reading.age_s or 0.0:.3f}s"
        data.append(_datum(f"{name} age", age, _ranges(checked, "s")))
    return data


def _datum(name: str, value: str, ranges: tuple[str, str]) -> str:
    label = "".join(c if c.isprintable() and c not in "=|" else "_" for c in name)
    return f"'{label.replace(chr(39), chr(39) * 2)}'={value};{ranges[0]};{ranges[1]};0"


def _ranges(checked: Checked, unit: str) -> tuple[str, str]:
    """Return the limits of one unit; `2:` is one that is to be reached."""

    def said(limit: Limit | None) -> str:
        if limit is None or limit.unit != unit:
            return ""
        return f"{limit.value:.15g}{':' * (unit == 'workers')}"

    return said(checked.warn), said(checked.crit)


class _Metric(NamedTuple):
    name: str
    help: str
    value: Callable[[Reading], float]


def _value(reading: Reading) -> float:
    return reading.value


def _age(reading: Reading) -> float:
    return reading.age_s or 0.0


_METRICS: dict[CheckName, tuple[_Metric, ...]] = {
    "lag": (
        _Metric(
            "bus_group_undelivered_events", "Events that a group was not given, at least.", _value
        ),
        _Metric(
            "bus_group_oldest_undelivered_age_seconds",
            "Age of the oldest event that a group was not given.",
            _age,
        ),
    ),
    "pending": (
        _Metric(
            "bus_group_pending_events",
            "Events that a group was given and has not finished.",
            _value,
        ),
        _Metric(
            "bus_group_oldest_pending_age_seconds",
            "Age of the oldest event that a group was given and has not finished.",
            _age,
        ),
    ),
    "dead": (_Metric("bus_dead_letters", "Dead letters of a group.", _value),),
    "workers": (_Metric("bus_group_workers", "Workers that live and serve a group.", _value),),
}
_STATUS_HELP = "What the check says: 0 ok, 1 warning, 2 critical, 3 unknown."


def prometheus(*checks: Checked) -> str:
    """Return the text exposition of several checks, each made once.

    What there is none of is 0 seconds old.
    """
    lines: list[str] = []
    for checked in checks:
        for metric in _METRICS[checked.check]:
            samples = [
                ({"topic": r.topic, "group": r.group}, metric.value(r)) for r in checked.readings
            ]
            lines += _family(metric.name, metric.help, samples)
    statuses: list[tuple[dict[str, str], float]] = [({"check": c.check}, c.status) for c in checks]
    lines += _family("bus_check_status", _STATUS_HELP, statuses)
    return "".join(f"{line}\n" for line in lines)


def _family(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> Iterable[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} gauge"
    for labels, value in samples:
        said = ",".join(f'{label}="{_escaped(v)}"' for label, v in labels.items())
        yield f"{name}{{{said}}} {value:.15g}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
