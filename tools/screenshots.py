"""Take the pictures of docs/dashboard.md: a server with the real model under some load, in a real browser.

Needs Chromium (`apt-get install chromium`) and the folder of the tests on the path: `make screenshots`.
"""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Page

from browser import DESKTOP, PHONE, chromium, opened
from server_process import QUIVER, clean_environment, serving

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = 256
"""Of a picture: more would cost bytes, and nobody would see them."""
WARM_UP_MS = 40_000
"""In which the charts get something to show."""
PEOPLE = (
    ("ann@example.com", "the operator", "scale", "embed,rerank,classify,tokenize,usage,metrics,admin"),
    ("bob@example.com", "search service", "pro", "embed,rerank"),
    ("carla@example.com", "nightly index", "free", "embed"),
)


def keys_in(folder: Path) -> list[str]:
    """Make some keys."""
    made = []
    for email, name, tier, scopes in PEOPLE:
        words = ("keys", "create", "--email", email, "--name", name, "--tier", tier, "--scopes", scopes)
        environment = clean_environment(QUIVER_DATA_DIR=str(folder))
        done = subprocess.run([*QUIVER, *words], capture_output=True, text=True, env=environment, check=True)  # noqa: S603
        made.append(done.stdout.strip())
    return made


@contextmanager
def busy(url: str, keys: list[str]) -> Iterator[None]:
    """Keep a server at work: texts of which some come again, by two APIs."""
    over = threading.Event()

    def work(key: str, seconds: float, size: int) -> None:
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30) as client:
            turn = 0
            while not over.wait(seconds * (1 + 0.8 * ((turn // 12) % 2))):
                turn += 1
                number = turn % 30 if turn % 3 else turn  # what came before, or something new
                texts = [f"the {number * size + i}th text of a morning's work" for i in range(size)]
                if turn % 4:
                    client.post("/v1/embeddings", json={"input": texts})
                else:
                    client.post("/v1/rerank", json={"query": "a morning", "documents": texts})

    threads = [
        threading.Thread(target=work, args=(keys[0], 0.1, 3)),
        threading.Thread(target=work, args=(keys[1], 0.4, 8)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def take(page: Page, name: str) -> None:
    """Keep what is seen, in few colours."""
    target = DOCS / f"dashboard-{name}.png"
    page.screenshot(path=target)
    with Image.open(target) as picture:
        picture.convert("RGB").quantize(COLOURS).save(target, optimize=True)
    print(f"{target.relative_to(DOCS.parent)}: {target.stat().st_size / 1000:.0f} kB")


def show(page: Page, name: str) -> None:
    """Go to a page, and let it do what it is for."""
    page.evaluate(f"location.hash = {json.dumps(f'#/{name}')}")
    page.locator("main > :nth-child(2)").wait_for(state="attached")
    if name == "embed":
        page.get_by_role("button", name="Compare").click()
        page.get_by_role("img", name="How alike").wait_for()
    if name == "benchmark":
        page.get_by_label("Seconds for a step").fill("2")
        page.get_by_role("button", name="Start").click()
        page.get_by_text("Done: at best").wait_for()
    page.wait_for_timeout(700)


def main() -> None:
    """Take all of them."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        keys = keys_in(Path(folder))
        environment = {"QUIVER_DATA_DIR": folder, "QUIVER_DASHBOARD": "true", "QUIVER_LOG_FORMAT": "json"}
        with serving(**environment) as server:
            url = server.ready_url()
            with opened(browser, f"{url}/admin/", keys[0], color_scheme="light", viewport=DESKTOP) as page:
                page.set_default_timeout(60_000)
                with busy(url, keys):
                    page.wait_for_timeout(WARM_UP_MS)
                    take(page, "overview")
                    page.set_viewport_size(PHONE)
                    page.wait_for_timeout(700)
                    take(page, "phone")
                page.set_viewport_size(DESKTOP)
                show(page, "benchmark")
                take(page, "benchmark")
                page.emulate_media(color_scheme="dark")
                for name in ("embed", "keys"):
                    show(page, name)
                    take(page, name)


if __name__ == "__main__":
    sys.exit(main())
