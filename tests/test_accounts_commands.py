"""From nothing to a key: the commands that the page on accounts shows, as they stand there, against a real server."""

import re
import shutil
import subprocess
import sys

import pytest

from server_process import clean_environment, serving
from test_docs import read

BASH = shutil.which("bash") or "bash"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands():
    """Return the commands of the page, without what is said of them."""
    (block,) = BLOCK.findall(read("docs/accounts.md"))
    return [line.partition("  #")[0].strip() for line in block.splitlines()]


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page calls curl")
def test_the_page_leads_from_nothing_to_a_key(tmp_path):
    """Each command does what it is there for: a database, a key that opens the server, and what it used."""
    upgrade, create, serve, ask, usage = commands()
    assert serve == "quiver serve"

    def run(command, **env):
        return subprocess.run(  # noqa: S603  the page's own
            [BASH, "-euo", "pipefail", "-c", command.replace("quiver ", f"'{sys.executable}' -m quiver ", 1)],
            capture_output=True,
            text=True,
            check=True,
            env=clean_environment(QUIVER_DATA_DIR=str(tmp_path), COLUMNS="200", **env),
        ).stdout

    run(upgrade)
    key = run(f"{create}; echo $KEY").strip()
    with serving("--data-dir", str(tmp_path)) as server:
        url = server.ready_url()
        there = ask.replace("http://localhost:8000", url).replace("curl ", "curl -s ")
        assert '"object":"embedding"' in run(there, KEY=key)
        assert '"code":"invalid_api_key"' in run(there, KEY=f"{key}x")
        server.process.terminate()
        assert server.ended() == 0
    shown = run(usage)
    assert "ann@example.com" in shown
    assert key.split("_")[1] in shown
    assert key not in shown
