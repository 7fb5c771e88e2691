"""Files in the database, part by part: no more than a part is ever in memory, and every server of it has them."""

from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import RowMapping, and_, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from quiver.db.database import Database
from quiver.db.jobs import paged
from quiver.db.lines import Lines
from quiver.db.tables import FILES, PARTS
from quiver.errors import UnknownFile
from quiver.job import LineState, Page, StoredFile

UPLOAD_SECONDS = 24 * 3600.0
"""What is not whole after so long never will be."""


class Files:
    """What is kept of files."""

    def __init__(self, database: Database, lines: Lines) -> None:
        self._database = database
        self._lines = lines

    async def begin(self, file: StoredFile) -> None:
        """Begin a file that comes in parts; nobody sees it before it is whole."""
        values = {name: getattr(file, name) for name in _NAMES} | {"expires_at": file.created_at + UPLOAD_SECONDS}
        await self._run(insert(FILES).values(**values, is_whole=False))

    async def append(self, file_id: str, number: int, data: bytes) -> None:
        """Add a part to a file."""
        await self._run(insert(PARTS).values(file_id=file_id, number=number, data=data))

    async def complete(self, file: StoredFile) -> None:
        """Let a file be seen. Raises `UnknownFile` if it took so long that it was given up."""
        values = {"num_bytes": file.num_bytes, "expires_at": file.expires_at, "filename": file.filename}
        values |= {"purpose": file.purpose, "is_whole": True}
        statement = update(FILES).where(FILES.c.id == file.id).values(values)

        async def work(connection: AsyncConnection) -> int:
            return (await connection.execute(statement)).rowcount

        if not await self._database.write(work):
            raise UnknownFile("the upload took too long: send it again")

    async def get(self, file_id: str) -> StoredFile | None:
        """Find a file that is whole."""
        found = await self._all(select(FILES).where(FILES.c.id == file_id, FILES.c.is_whole.is_(True)))
        return found[0] if found else None

    async def listed(self, owner: str, purpose: str | None, page: Page) -> list[StoredFile]:
        """List an owner's files by their age. Raises `InvalidInput`."""
        query = select(FILES).where(FILES.c.owner == owner, FILES.c.is_whole.is_(True))
        query = query.where(FILES.c.purpose == purpose) if purpose else query
        return await self._all(await paged(self._database, query, FILES, page))

    async def read(self, file: StoredFile) -> AsyncIterator[bytes]:
        """Yield a file's bytes in parts."""
        if file.job_id is not None and file.line_state is not None:
            async for part in self._read_lines(file.job_id, file.line_state):
                yield part
            return
        number = 0
        while (data := await self._part(file.id, number)) is not None:
            yield data
            number += 1

    async def _read_lines(self, job_id: str, state: LineState) -> AsyncIterator[bytes]:
        after = 0
        while results := await self._lines.results(job_id, state, after=after):
            after = results[-1][0]
            yield b"".join([result + b"\n" for _, result in results])

    async def _part(self, file_id: str, number: int) -> bytes | None:
        query = select(PARTS.c.data).where(PARTS.c.file_id == file_id, PARTS.c.number == number)

        async def work(connection: AsyncConnection) -> bytes | None:
            data = (await connection.execute(query)).scalar_one_or_none()
            return None if data is None else bytes(data)

        return await self._database.read(work)

    async def remove(self, file_id: str) -> None:
        """Remove a file; the row goes last, so that what is cut short is done again."""
        of_it = and_(PARTS.c.file_id == file_id)
        while (last := await self._last_part(file_id)) is not None:
            await self._run(delete(PARTS).where(of_it, PARTS.c.number > last - 8))
        await self._run(delete(FILES).where(FILES.c.id == file_id))

    async def _last_part(self, file_id: str) -> int | None:
        query = select(func.max(PARTS.c.number)).where(PARTS.c.file_id == file_id)

        async def work(connection: AsyncConnection) -> int | None:
            last: int | None = (await connection.execute(query)).scalar_one_or_none()
            return last

        return await self._database.read(work)

    async def outlived(self, now: float) -> list[StoredFile]:
        """List the files whose time has run out."""
        return await self._all(select(FILES).where(FILES.c.expires_at <= now).limit(100))

    async def of_job(self, job_id: str) -> list[StoredFile]:
        """List the files that a job's lines are."""
        return await self._all(select(FILES).where(FILES.c.job_id == job_id))

    async def _run(self, statement: Any) -> None:
        await self._database.write(lambda connection: connection.execute(statement))

    async def _all(self, query: Any) -> list[StoredFile]:
        async def work(connection: AsyncConnection) -> list[StoredFile]:
            return [_file(row) for row in (await connection.execute(query)).mappings()]

        return await self._database.read(work)


_NAMES = tuple(StoredFile.__dataclass_fields__)


def _file(row: RowMapping) -> StoredFile:
    state = row["line_state"]
    values = {name: row[name] for name in _NAMES}
    return StoredFile(**{**values, "line_state": None if state is None else LineState(state)})
