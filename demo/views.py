"""How the views that the application keeps were used, and whether they are right."""

from collections.abc import Iterable
from dataclasses import dataclass

from demo.ingest import ARCHIVE_ID, DATASET_ID, Ingest
from handlers.indexing import search


@dataclass(slots=True)
class Views:
    """How often this program's searches and lists were answered from a view that was kept.

    wrong: searches whose answer was another than without the cache, with nothing left to do.
    """

    hits: int = 0
    misses: int = 0
    wrong: int = 0


async def look_at_views(ingest: Ingest, searches: Iterable[str]) -> Views:
    """Search and list both datasets, twice, so that views are kept of what is to be deleted."""
    datasets = ingest.datasets
    wrong = 0
    for dataset_id in (DATASET_ID, ARCHIVE_ID) * 2:
        await datasets.documents(dataset_id)
        for words in searches:
            answer = await datasets.search(dataset_id, words)
            wrong += answer != await search(datasets.bus.redis, dataset_id, words)
    return Views(datasets.cache.hits, datasets.cache.misses, wrong)
