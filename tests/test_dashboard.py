"""The dashboard as a person meets it, in Chromium: each page, each action, what is refused, and what moves by itself."""

import re
import threading
import time

import pytest
from playwright.sync_api import Page, expect

from browser import FAILING, HELD, PHONE, chromium, context_for, opened, staged, tab, tunnel

PAGES = {
    "": "Overview", "models": "Models", "jobs": "Jobs", "settings": "Settings", "embed": "Embed", "rerank": "Rerank",
    "benchmark": "Benchmark", "keys": "Keys", "tiers": "Users and tiers", "usage": "Usage",
}  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    """Start one browser for all of them."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def stage(browser, tmp_path_factory):
    """Run one server for all of them."""
    del browser  # without one, no server is needed
    with staged(tmp_path_factory.mktemp("dashboard")) as stage:
        yield stage


@pytest.fixture(scope="module")
def profile(browser, stage):
    """Make a profile with the operator's key, whose tabs share what they have loaded."""
    context = context_for(browser, stage.keys["operator"])
    yield context
    context.close()


@pytest.fixture
def page(profile, stage):
    """Open the dashboard with the operator's key."""
    with tab(profile, f"{stage.url}/admin/") as page:
        yield page


def go(page: Page, name: str) -> None:
    """Go to a page by the navigation."""
    page.get_by_role("navigation").get_by_role("link", name=PAGES[name], exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(PAGES[name])


def tile(page: Page, name: str) -> str:
    """Return what a tile of the overview says."""
    return page.get_by_role("region", name=name, exact=True).inner_text()


def row(page: Page, text: str):
    """Find the row of a table with a text."""
    return page.get_by_role("row").filter(has_text=text)


# Who gets in


def test_without_a_key_nothing_is_shown(browser, stage):
    """The page asks for a key, says of a wrong one and of one without the scope why it is refused, and opens to a good one."""
    with opened(browser, f"{stage.url}/admin") as page:
        dialogue = page.get_by_role("dialog")
        expect(dialogue).to_contain_text("scope admin")
        assert "stub/a" not in page.inner_text("main")
        for key, why in (("nonsense", "the API key is wrong"), (stage.keys["caller"], "not for admin")):
            dialogue.get_by_label("Key").fill(key)
            dialogue.get_by_role("button", name="Open").click()
            expect(dialogue.get_by_role("alert")).to_contain_text(why)
            assert page.evaluate("sessionStorage.length") == 0
        dialogue.get_by_label("Key").fill(stage.keys["operator"])
        dialogue.get_by_role("button", name="Open").click()
        expect(dialogue).to_have_count(0)
        expect(row(page, "stub/a")).to_contain_text("ready")
        assert page.context.cookies() == []
        assert stage.keys["operator"] not in page.evaluate("JSON.stringify(localStorage)")


def test_a_key_that_ends_locks_the_page(browser, stage):
    """Once its key is revoked the page shows nothing new, and says why."""
    with stage.client() as http:
        key = http.post("/admin/api/keys", json={"email": "x@b.c", "scopes": ["admin"]}).json()
    with opened(browser, f"{stage.url}/admin/", key["key"]) as page, stage.client() as http:
        expect(row(page, "stub/a")).to_contain_text("ready")
        http.post(f"/admin/api/keys/{key['row']['id']}/revoke", json={})
        expect(page.get_by_role("dialog")).to_contain_text("the API key is wrong")


def test_at_its_socket_no_key_is_asked_for(browser, stage):
    """By a tunnel to admin.sock the page is at the root, and works; a name that points there from elsewhere does not."""
    with tunnel(stage.folder / "sockets" / "admin.sock") as url:
        with opened(browser, url) as page:
            expect(row(page, "stub/a")).to_contain_text("ready")
            go(page, "embed")
            page.get_by_role("button", name="Compare").click()
            expect(page.get_by_role("img", name=re.compile("How alike"))).to_be_visible()
        with opened(browser, url.replace("127.0.0.1", "rebound.example")) as page:
            expect(page.get_by_role("alert").first).to_contain_text("is no name of this machine")


# Each page


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole(page, name):
    """It has its heading and its name, says where one is, is labelled throughout, and fits a phone in light and dark."""
    if name:
        go(page, name)
    expect(page).to_have_title(f"{PAGES[name]} · Quiver")
    expect(page.locator("nav [aria-current=page]")).to_have_text(PAGES[name])
    expect(page.locator("main > :nth-child(2)")).to_have_count(1)
    expect(page.locator("main")).not_to_contain_text("Loading")
    colours = set()
    for scheme, size in (("light", None), ("dark", PHONE)):
        page.emulate_media(color_scheme=scheme)
        if size:
            page.set_viewport_size(size)
        page.wait_for_timeout(50)
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{scheme} is too wide"
    assert len(colours) == 2
    assert page.evaluate(UNNAMED) == []


UNNAMED = """() => [
  ...[...document.querySelectorAll("input, select, textarea")].filter((each) => !each.labels.length),
  ...[...document.querySelectorAll("button, a, summary")].filter((each) => !each.textContent.trim() && !each.ariaLabel),
  ...[...document.querySelectorAll("svg[role=img]")].filter((each) => !each.getAttribute("aria-label")),
  ...[...document.querySelectorAll("img")].filter((each) => !each.hasAttribute("alt")),
  ...[...document.querySelectorAll("[id]")].filter((each) => document.querySelectorAll(`[id="${CSS.escape(each.id)}"]`).length > 1),
].map((each) => each.outerHTML.slice(0, 100))"""
"""What somebody who does not see the page could not tell apart."""


def test_it_can_be_used_by_keyboard(page):
    """The first stop leads past the navigation, and the menu of a phone says whether it is open."""
    page.keyboard.press("Tab")
    expect(page.locator(":focus")).to_have_text("Skip to the page")
    page.set_viewport_size(PHONE)
    menu = page.get_by_role("button", name="Menu")
    expect(menu).to_have_attribute("aria-expanded", "false")
    expect(page.get_by_role("navigation")).to_be_hidden()
    menu.press("Enter")
    expect(menu).to_have_attribute("aria-expanded", "true")
    go(page, "usage")
    expect(page.get_by_role("navigation")).to_be_hidden()


def test_the_theme_is_the_readers(browser, stage):
    """It follows the system until its reader chooses, and is kept."""
    with opened(browser, f"{stage.url}/admin/", stage.keys["operator"]) as page:
        check_theme(page)


def check_theme(page: Page) -> None:
    """Choose one theme after the other."""
    theme = page.get_by_role("button", name="Theme")
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    theme.click()
    expect(theme).to_have_text("Theme: light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.reload()
    expect(theme).to_have_text("Theme: light")
    theme.click()
    page.emulate_media(color_scheme="light")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


# What moves


def test_the_overview_moves_by_itself(page, stage):
    """Requests that others make show within seconds, and the page was not loaded again for it."""
    expect(row(page, "stub/a")).to_contain_text("ready")
    page.evaluate("document.body.dataset.mark = 'the same page'")
    before = tile(page, "Requests a second")
    with stage.client("caller") as http:
        for i in range(20):
            assert http.post("/voyage/v1/embeddings", json={"input": [f"a text {i % 4}"]}).status_code == 200
        expect(row(page, "voyage")).to_contain_text("20")
        expect(page.get_by_role("region", name="Cache hits", exact=True)).to_contain_text("80 %")
        expect(page.get_by_role("region", name="Latency", exact=True)).to_contain_text("median of the last minute")
        expect(page.get_by_role("region", name="Tokens a second", exact=True).locator("path.line")).to_have_count(1)
    assert tile(page, "Requests a second") != before
    assert page.evaluate("document.body.dataset.mark") == "the same page"


def test_a_server_that_does_not_answer_is_said_and_found_again(page):
    """What is shown stays, the head of the page says that it is old, and it goes on by itself."""
    expect(row(page, "stub/a")).to_contain_text("ready")
    page.context.set_offline(True)
    expect(page.locator("#server")).to_contain_text("does not answer")
    assert row(page, "stub/a").count() == 1
    page.context.set_offline(False)
    expect(page.locator("#server")).to_contain_text("running")


def test_a_hidden_page_asks_nothing(page, stage):
    """Nobody looks: the server is left alone until somebody does."""
    expect(row(page, "stub/a")).to_contain_text("ready")
    page.evaluate("Object.defineProperty(document, 'hidden', {configurable: true, get: () => true})")
    page.wait_for_timeout(2100)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(2100)
    assert asked == []
    with page.expect_request(f"{stage.url}/admin/api/status"):
        page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    assert asked == [f"{stage.url}/admin/api/status"]


def test_a_model_that_failed_is_shown_with_the_reason(page, stage):
    """On the overview as an alert, and with the model."""
    with stage.client() as http:
        assert http.post("/v1/embeddings", json={"model": FAILING, "input": "a"}).status_code == 503
    expect(page.get_by_role("alert").filter(has_text=FAILING)).to_contain_text("could not be loaded")
    go(page, "models")
    expect(page.locator("article").filter(has_text=FAILING)).to_contain_text("failed")


def test_a_download_shows_how_far_it_is(page, stage):
    """Each file with its bytes, and what came of it once it is here."""
    go(page, "models")

    def ask():
        with stage.client() as http:
            http.post("/v1/embeddings", json={"model": HELD, "input": "a"})

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        article = page.locator("article").filter(has_text=HELD)
        expect(article).to_contain_text("downloading")
        expect(article.get_by_role("listitem").filter(has_text="model.safetensors")).to_contain_text(
            re.compile("1[0-2] MiB of 24 MiB")
        )
    finally:
        stage.hub.gate.set()
        asking.join()
    expect(article).to_contain_text("failed")
    expect(article.get_by_role("alert")).to_contain_text("model.safetensors is cut short, corrupt")


# Trying


def test_texts_are_compared(page):
    """A heat map of every pair with its number, the nearest two in words, and a mistake in the server's words."""
    go(page, "embed")
    page.get_by_label("Texts").fill("one\n\n  two  \nthree <b>bold</b>\none")
    page.get_by_label("Model", exact=True).select_option("stub/b")
    page.get_by_label("Dimensions").fill("40")
    page.get_by_role("button", name="Compare").click()
    cells = page.get_by_role("img", name=re.compile("How alike 4 texts")).locator(".cell")
    expect(cells).to_have_count(16)
    assert [cells.nth(i).locator("text").text_content() for i in (0, 3, 5, 12)] == ["1.00"] * 4
    result = page.get_by_role("region", name="Result")
    expect(result).to_contain_text("stub/b · 40 dimensions")
    expect(result).to_contain_text("Most alike: one and one (1)")
    expect(result.get_by_role("listitem")).to_have_count(4)
    expect(result).to_contain_text("three <b>bold</b>")
    page.get_by_label("Dimensions").fill("99")
    page.get_by_role("button", name="Compare").click()
    expect(result.get_by_role("alert")).to_contain_text("dimensions is 99")


def test_documents_are_ranked(page, stage):
    """In the order of the API, with scores and where they stood."""
    documents = ["one", "two", "three"]
    with stage.client() as http:
        theirs = http.post("/jina/v1/rerank", json={"query": "q", "documents": documents}).json()["results"]
    go(page, "rerank")
    page.get_by_label("Query").fill("q")
    page.get_by_label("Documents").fill("\n".join(documents))
    page.get_by_role("button", name="Rank").click()
    items = page.get_by_role("region", name="Result").get_by_role("listitem")
    expect(items).to_have_count(3)
    for item, each in zip(items.all(), theirs, strict=True):
        expect(item).to_contain_text(documents[each["index"]])
        expect(item).to_contain_text(f"was {each['index'] + 1}")


def test_a_benchmark_draws_its_charts_and_can_be_stopped(page):
    """Each step is a point in both charts and a row; stopped, it says so and can begin anew."""
    go(page, "benchmark")
    page.get_by_label("Seconds for a step").fill("1")
    page.get_by_label("Up to").select_option("2")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_text("Done: at best")).to_be_visible()
    expect(page.get_by_role("img", name="Tokens a second").locator("circle")).to_have_count(2)
    expect(page.get_by_role("img", name="Latency").locator("circle")).to_have_count(6)
    expect(page.get_by_role("table").get_by_role("row")).to_have_count(3)
    page.get_by_label("Seconds for a step").fill("20")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_text("1 at a time: step 1 of 2")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped.")).to_be_visible()
    expect(page.get_by_role("button", name="Start")).to_be_enabled()


# Accounts


def make_key(page: Page, name: str) -> str:
    """Make a key in the page, and return its text."""
    page.get_by_role("button", name="New key").click()
    dialogue = page.get_by_role("dialog")
    dialogue.get_by_label("Whose it is").fill("carla@example.com")
    dialogue.get_by_label("Name").fill(name)
    dialogue.get_by_label("classify").uncheck()
    dialogue.get_by_role("button", name="Make the key").click()
    return kept(page)


def kept(page: Page) -> str:
    """Read the key that is shown this once, and say that it is kept."""
    dialogue = page.get_by_role("dialog").filter(has_text="It is not shown again")
    key = dialogue.get_by_label("Key").input_value()
    dialogue.get_by_role("button", name="I have kept it").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    return key


def status_of(stage, key: str) -> int:
    """Ask with a key."""
    with stage.client() as http:
        shown = {"authorization": f"Bearer {key}"}
        return http.post("/v1/embeddings", json={"input": "a"}, headers=shown).status_code


def test_a_key_is_shown_once_replaced_and_revoked(page, stage):
    """It works, and so does the one that replaces it; the page shows neither again, nor runs what stands in a name."""
    go(page, "keys")
    name = "<img src=x onerror=document.title=1>"
    first = make_key(page, name)
    assert status_of(stage, first) == 200
    expect(row(page, name)).to_contain_text("good")
    assert first not in page.content()
    page.get_by_role("button", name=f"Replace key {first.split('_')[1]}").click()
    page.get_by_label("The old key ends").select_option("0")
    page.get_by_role("dialog").get_by_role("button", name="Replace").click()
    second = kept(page)
    assert status_of(stage, second) == 200
    expect(row(page, first.split("_")[1])).to_contain_text("revoked")
    page.get_by_role("button", name=f"Revoke key {second.split('_')[1]}").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    expect(row(page, second.split("_")[1])).to_contain_text("revoked")
    ends = time.monotonic() + 5
    while {status_of(stage, first), status_of(stage, second)} != {401}:
        assert time.monotonic() < ends
    expect(page).to_have_title("Keys · Quiver")


def test_a_dialogue_that_is_closed_changes_nothing(page):
    """Escape and Cancel leave everything as it is, and a mistake keeps the dialogue open with the reason."""
    go(page, "keys")
    expect(page.get_by_role("table")).to_be_visible()
    before = page.get_by_role("row").count()
    page.get_by_role("button", name="New key").click()
    expect(page.get_by_role("dialog")).to_be_visible()  # it asks for the tiers first, and nothing hears a key before
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("button", name="New key").click()
    dialogue = page.get_by_role("dialog")
    dialogue.get_by_label("Whose it is").fill("a@b")
    for scope in dialogue.get_by_role("checkbox").all():
        scope.uncheck()
    dialogue.get_by_role("button", name="Make the key").click()
    expect(dialogue.get_by_role("alert")).to_contain_text("Choose what the key is good for")
    dialogue.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.get_by_role("row").count() == before


def test_tiers_and_users_are_edited(page):
    """A tier is added and changed, a user is added and moved to it."""
    go(page, "tiers")
    page.get_by_role("button", name="New tier").click()
    page.get_by_label("Name").fill("gold")
    page.get_by_label("Embeddings in a month").fill("5000")
    page.get_by_role("button", name="Save").click()
    expect(row(page, "gold")).to_contain_text("5,000")
    page.get_by_role("button", name="Edit tier gold").click()
    page.get_by_label("Embeddings in a month").fill("")
    page.get_by_label("Requests a second").fill("2.5")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("two parts")
    page.get_by_label("At once after a rest").fill("10")
    page.get_by_role("button", name="Save").click()
    expect(row(page, "gold")).to_contain_text("no bound")
    expect(row(page, "gold")).to_contain_text("2.5")
    page.get_by_role("button", name="New user").click()
    page.get_by_label("Address").fill("dora@example.com")
    page.get_by_role("button", name="Save").click()
    expect(row(page, "dora@example.com")).to_contain_text("free")
    page.get_by_role("button", name="Edit user dora@example.com").click()
    page.get_by_label("Tier", exact=True).select_option("gold")
    page.get_by_role("button", name="Save").click()
    expect(row(page, "dora@example.com")).to_contain_text("gold")


def test_usage_is_shown_by_month(page, stage):
    """What a key has used stands with its user and key, and not in another month."""
    with stage.client("caller") as http:
        assert http.post("/v1/embeddings", json={"input": ["usage a", "usage b"]}).status_code == 200
    page.wait_for_timeout(1500)
    go(page, "usage")
    expect(row(page, stage.keys["caller"].split("_")[1])).to_contain_text("stub/a")
    page.get_by_label("Month (UTC)").select_option(index=1)
    expect(page.get_by_text("Nothing was used with a key in this month")).to_be_visible()


# Jobs and settings


def test_a_job_is_shown_and_stopped(page, stage):
    """One that runs appears by itself, tells what it is, and ends when it is told to."""
    go(page, "jobs")
    body = {"input": {"openai_route": "/v1/embeddings", "openai_input": {"model": "stub/b", "input": ["!stall 40"]}}}
    with stage.client() as http:
        job = http.post("/run", json=body).json()["id"]
    expect(row(page, job)).to_contain_text("open")
    page.get_by_role("button", name=f"Show job {job}").click()
    expect(page.get_by_role("dialog")).to_contain_text("user")
    page.get_by_role("button", name="Close").click()
    page.get_by_role("button", name=f"Cancel job {job}").click()
    page.get_by_role("button", name="Stop the job").click()
    expect(row(page, job)).to_contain_text("cancelled")
    expect(page.get_by_role("button", name=f"Cancel job {job}")).to_have_count(0)


def test_settings_are_shown_without_their_secrets(page):
    """They can be searched, and narrowed to what differs from the default."""
    go(page, "settings")
    expect(row(page, "hub_token")).to_contain_text("***")
    assert "hf_hidden" not in page.content()
    page.get_by_label("Find").fill("dashboard")
    expect(row(page, "QUIVER_DASHBOARD")).to_contain_text("changed")
    expect(row(page, "hub_token")).to_have_count(0)
    page.get_by_label("Find").fill("")
    page.get_by_label(re.compile("differ")).check()
    expect(row(page, "QUIVER_PORT")).to_have_count(1)
    expect(row(page, "QUIVER_HEADER_SECONDS")).to_have_count(0)
