"""Deletes files and uploads whose time is over, also when nobody asks for them."""

import asyncio
import traceback

from labkit.service import files, uploads
from labkit.service.gate import log
from labkit.service.store import Store

PERIOD = 60  # seconds


async def watch(store: Store) -> None:
    """Look every minute until cancelled."""
    while True:
        try:
            await asyncio.to_thread(files.drop_expired, store)
            await asyncio.to_thread(uploads.drop_expired, store)
        except Exception as error:  # such as a busy database: the next look may do
            log("error", type=type(error).__name__, frames=traceback.format_tb(error.__traceback__))
        await asyncio.sleep(PERIOD)
