"""Channels in the browser: `bus.web.sse(request, channel)`. Needs the extra `web`."""

try:
    from bus.web.response import sse
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("sse_starlette", "starlette"):
        raise
    raise ModuleNotFoundError(
        "bus.web needs Starlette and sse-starlette: pip install 'bus-streams[web]'",
        name=error.name,
    ) from error

__all__ = ["sse"]
