"""The doors: each makes a real input once, and gives the door a mutated one at each call.

A surface is a function of a folder that returns a :data:`tests.hostile.drive.Put`; everything it needs is made there.
"""

from collections.abc import Callable
from pathlib import Path

from tests.hostile.drive import Put
from tests.hostile.surfaces.records import csv, image, jsonl, parquet
from tests.hostile.surfaces.runs import adapter, checkpoint, configuration, gates, run_folder
from tests.hostile.surfaces.services import answers, ledger, messages, requests, tags
from tests.hostile.surfaces.shards import index, manifest, tar

SURFACES: dict[str, Callable[[Path], Put]] = {
    surface.__name__: surface
    for surface in (
        *(jsonl, csv, parquet, configuration, manifest, tar, index, image, adapter, checkpoint, run_folder, gates),
        *(ledger, tags, requests, answers, messages),
    )
}
"""Name → the door."""
