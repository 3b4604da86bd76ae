"""A page that streams an agent's run: what the model says appears as it comes.

    pip install 'bus-streams[web]' fastapi uvicorn
    BUS_URL=redis://localhost:6379/0 uvicorn examples.agent_stream:app

The page asks for a run, and follows its channel. A handler does the run, here or in any other
worker, and says on the channel what happens. A page whose connection is cut comes back by itself
and goes on behind the last piece it has; one that is loaded again gets all from the beginning.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request, Response
from fastapi import Path as InPath
from fastapi.responses import HTMLResponse

from bus import Bus, ChannelEnded, Delivery, Event, Worker, event_handler
from bus.agents import agent_run_finished, agent_run_started, model_content_block_delta
from bus.web import sse

PAGE = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
RunId = Annotated[str, InPath(pattern="^[0-9a-f]{32}$")]  # whoever knows it may read: not guessable
bus = Bus.connect()


class RunRequested(Event, type="run.requested", key="run_id"):
    """Somebody has asked for a run."""

    run_id: str
    request: str


async def model(request: str) -> AsyncGenerator[str, None]:
    """Stand in for a model: say the request again, a word at a time."""
    for word in request.split():
        await asyncio.sleep(0.03)
        yield f"{word} "


@event_handler(RunRequested, group="agent")
async def run_agent(event: RunRequested, delivery: Delivery[RunRequested]) -> None:
    """Do the run. If a worker dies of it, another begins it again, and the page with it."""
    channel = delivery.bus.channel(event.run_id)
    with suppress(ChannelEnded):  # it was over when the first one died
        await channel.publish(agent_run_started(event.run_id, agent="echo", request=event.request))
        async for text in model(event.request):
            await channel.publish(
                model_content_block_delta(event.run_id, message_id="m", index=0, text=text)
            )
        await channel.publish(agent_run_finished(event.run_id))
        await channel.end()


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncGenerator[dict[str, Any], None]:
    """Run the worker in this process, too; `bus worker examples.agent_stream` runs more."""
    async with bus.lifespan(app) as state, Worker(bus, handlers=[run_agent]):
        yield state


app = FastAPI(lifespan=serving)


@app.get("/", response_class=HTMLResponse)
async def page() -> str:
    """Return the page."""
    return PAGE


@app.post("/runs")
async def start(request: Annotated[str, Body(embed=True, max_length=10_000)]) -> dict[str, str]:
    """Ask for a run; return its id."""
    run_id = secrets.token_hex(16)
    await bus.publish(RunRequested(run_id=run_id, request=request))
    return {"run_id": run_id}


@app.get("/runs/{run_id}")
async def follow(run_id: RunId, request: Request) -> Response:
    """Stream a run, from where the browser has left it."""
    return sse(request, bus.channel(run_id))
