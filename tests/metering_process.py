"""A process that settles usage until it is killed: prints the id and worth of each request that is safely on disk.

python metering_process.py DATABASE_URL SPOOL_FOLDER USER_ID KEY_ID
"""

import asyncio
import itertools
import sys
from pathlib import Path

from quiver.accounts import ApiKey, Tier, User
from quiver.db import Database, Ledger
from quiver.metering import Meter
from quiver.spool import Spool


async def main(url: str, folder: Path, user_id: int, key_id: str) -> None:
    """Settle requests in several tasks, and flush all the time."""
    key = ApiKey(id=key_id, prefix="qv", hash="", user=User(user_id, "ann@b.c", Tier("own")))
    async with Database(url) as database, Meter(Ledger(database), Spool(folder)) as meter:
        await asyncio.gather(flush(meter), *(work(meter, key) for _ in range(8)))


async def work(meter: Meter, key: ApiKey) -> None:
    """Answer one request after the other; one is said to be answered once it is on disk."""
    sizes = itertools.cycle(range(1, 12))
    while True:
        embeddings, tokens = next(sizes), next(sizes)
        async with meter.reservation(key, embeddings) as reservation:
            saved = meter.settle(reservation, model="m", cached=0, tokens=tokens)
        if await saved:
            sys.stdout.write(f"{reservation.request.id} {embeddings} {tokens}\n")
            sys.stdout.flush()
        await asyncio.sleep(0)


async def flush(meter: Meter) -> None:
    """Bring it to the ledger as fast as that goes, so that a kill comes in the middle of it."""
    while True:
        await meter.flush()
        await asyncio.sleep(0.001)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
