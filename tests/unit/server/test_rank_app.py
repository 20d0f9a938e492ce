"""The ranking page over HTTP: who may do what, what is refused, what is sent. Names of tests begin with the case of the
list of bad inputs that they are for."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tetrad import disk
from tetrad.server import rank_app
from tetrad.server.app import create_app
from tetrad.server.guard import Limits
from tetrad.server.rank_app import COOKIE, People
from tetrad.server.ranking import Item, Ranking
from tetrad.server.service import Service
from tetrad.settings.use import Rank, Serve
from tetrad.types import Prompt, Turn

PAGES = Path(rank_app.__file__).parent / "pages"


class Page:
    """A browser's side: its cookie and what it was last shown."""

    def __init__(self, app: Any, name: str = "") -> None:
        self.http = TestClient(app, base_url="http://127.0.0.1")
        if name:
            assert self.enter(name=name).status_code == 200

    def enter(self, **body: Any) -> Any:
        return self.http.post("/rank/enter", json=body)

    def state(self) -> dict[str, Any]:
        answer = self.http.get("/rank/item")
        assert answer.status_code == 200
        return dict(answer.json())

    def submit(self, state: dict[str, Any], headers: Any = None, **changes: Any) -> Any:
        body = {"item": state["item"]["id"], "verdict": "ranked", "ranks": [1, 2, 3], **changes}
        return self.http.post("/rank/submit", json=body, headers=headers or {"X-CSRF-Token": state["csrf"]})


def item(number: int, *answers: str) -> Item:
    texts = answers or tuple(f"answer {number}.{i}" for i in range(3))
    makers = tuple(f"runs/secret-{i}" for i in range(len(texts)))
    return Item(Prompt((Turn("system", "Be kind."), Turn("user", f"question {number}"))), texts, makers)


@pytest.fixture
def ranked(tmp_path: Path) -> Iterator[Ranking]:
    with Ranking(Rank(out=str(tmp_path / "ranked.jsonl"))) as ranking:
        for number in range(3):
            ranking.add(item(number))
        yield ranking


def app_of(ranked: Ranking, names: list[str] | None = None) -> Any:
    people = People(ranked.secret, names)
    return create_app(Service({}, None, Serve()), Limits(), rank_app.routes(ranked, people))


@pytest.fixture
def app(ranked: Ranking) -> Any:
    return app_of(ranked)


def stored(ranked: Ranking) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ranked.out.read_text().splitlines()]


def test_an_item_is_shown_ranked_and_stored(app: Any, ranked: Ranking) -> None:
    page = Page(app, "kim")
    state = page.state()
    assert state["item"]["turns"] == [
        {"role": "system", "text": "Be kind.", "cut": False},
        {"role": "user", "text": "question 0", "cut": False},
    ]
    answer = page.submit(state, comment="the first is funny")
    assert answer.status_code == 200
    (record,) = stored(ranked)
    assert answer.json() == {"stored": record}
    assert [choice["text"] for choice in record["choices"]] == [one["text"] for one in state["item"]["answers"]]
    assert [choice["rank"] for choice in record["choices"]] == [1, 2, 3]
    assert (record["annotator"], record["comment"]) == ("kim", "the first is funny")
    after = page.state()
    assert after["item"]["id"] != state["item"]["id"]
    assert after["progress"] == {"mine": 1, "done": 1, "items": 3, "pairs": 0, "alpha": None}


def test_without_a_name_there_is_no_item(app: Any) -> None:
    assert Page(app).state() == {"name": "", "links": False}


def test_l001_l002_the_pages_know_no_markup_in_text_and_no_other_host() -> None:
    sources = {path.name: path.read_text() for path in PAGES.iterdir() if path.is_file()}
    assert {"rank.html", "rank.js", "chat.html", "chat.js", "words.js", "base.css"} <= set(sources)
    for name, source in sources.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", source), name
        assert not re.search(r"https?:|url\(|@import|<img|<iframe|javascript:|src=\"//", source), name
        if name.endswith(".html"):
            assert not re.search(r"<style|\sstyle=|\son\w+=", source), name
            assert all(re.search(r'src="/pages/', tag) for tag in re.findall(r"<script[^>]*>", source)), name
            assert set(re.findall(r'(?:src|href)="(/[^"]*)"', source)) <= {f"/pages/{one}" for one in sources}


def test_both_languages_have_every_word() -> None:
    words = (PAGES / "words.js").read_text().split("\n};")[0]
    english, chinese = (set(re.findall(r"[{ ,](\w+): \"", part)) for part in words.split("\n  zh: {"))
    assert english == chinese
    used = {
        key
        for path in PAGES.iterdir()
        if path.suffix in (".html", ".js")
        for key in re.findall(
            r"data-(?:t|label|placeholder)=\"(\w+)\"|\bt\(\"(\w+)\"\)|banner\(\"(\w+)\"\)", path.read_text()
        )
    }
    assert {"".join(key) for key in used} <= english


def test_the_pages_are_served(app: Any) -> None:
    http = TestClient(app, base_url="http://127.0.0.1")
    for path in ("/", "/rank", *(f"/pages/{file.name}" for file in PAGES.iterdir() if file.is_file())):
        assert http.get(path).status_code == 200, path
    assert http.get("/rank").headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/pages/../rank_app.py", "/pages/%2e%2e/guard.py", "/pages/", "/pages/x.js"):
        assert http.get(path).status_code == 404, path


def test_l004_long_texts_are_cut_with_a_notice_and_stored_whole(app: Any, ranked: Ranking) -> None:
    long = "\x1b[31m" + "é\u0301" * 40_000
    ranked.items.clear()
    ranked._order.clear()
    ranked.add(item(9, long, "short"))
    page = Page(app, "kim")
    state = page.state()
    answers = state["item"]["answers"]
    assert sorted((len(one["text"]), one["cut"]) for one in answers) == [(5, False), (50_000, True)]
    assert page.submit(state, ranks=[1, 2]).status_code == 200
    assert long in [choice["text"] for choice in stored(ranked)[0]["choices"]]


def test_l005_the_token_must_be_ones_own(app: Any, ranked: Ranking) -> None:
    kim, lee = Page(app, "kim"), Page(app, "lee")
    state, other = kim.state(), lee.state()
    for headers in ({"X-CSRF-Token": ""}, {"X-CSRF-Token": other["csrf"]}, {"X-Other": "1"}):
        refused = kim.submit(state, headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "csrf")
    kim.http.cookies.clear()
    assert kim.submit(state).status_code == 403
    assert stored(ranked) == []


def test_l005_twice_is_one_row(app: Any, ranked: Ranking) -> None:
    page = Page(app, "kim")
    state = page.state()
    first, second = page.submit(state), page.submit(state)
    assert (first.status_code, second.status_code) == (200, 200)
    assert second.json() == first.json() == {"stored": stored(ranked)[0]}
    assert len(stored(ranked)) == 1


def test_the_cookie_is_strict_and_signed(app: Any) -> None:
    page = Page(app)
    cookie = page.enter(name="kim").headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    value = page.http.cookies[COOKIE]
    for forged in (
        value[:-1] + ("0" if value[-1] != "0" else "1"),
        "a2lt",
        "a2lt.",
        "\u00e9",
        "." * 100,
        value.upper(),
    ):
        page.http.cookies.clear()
        answer = page.http.get("/rank/item", headers={"Cookie": f"{COOKIE}={forged}".encode("latin-1")})
        assert answer.json() == {"name": "", "links": False}, forged


def test_personal_links(ranked: Ranking) -> None:
    people = People(ranked.secret, ["kim", "李雷"])
    app = app_of(ranked, ["kim", "李雷"])
    page = Page(app)
    assert page.state() == {"name": "", "links": True}
    for body in ({"name": "kim"}, {"link": "x"}, {"link": People(b"y" * 32, None).token("kim", "link")}):
        assert page.enter(**body).status_code == 403
    assert page.enter(link=people.token("kim", "session")).status_code == 403  # a cookie is no link
    assert page.enter(link=people.token("bob", "link")).status_code == 403  # no longer named
    assert page.enter(link=people.token("李雷", "link")).json() == {"name": "李雷"}
    assert page.state()["name"] == "李雷"


def test_l007_l008_other_hosts_origins_and_frames(app: Any, ranked: Ranking) -> None:
    page = Page(app, "kim")
    state = page.state()
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert page.submit(state, {"X-CSRF-Token": state["csrf"], **headers}).status_code == 403
    assert page.http.get("/rank", headers={"Host": "evil.example"}).status_code == 403
    policy = page.http.get("/rank").headers["content-security-policy"]
    for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"):
        assert rule in policy
    assert "img-src" not in policy and "unsafe" not in policy
    assert stored(ranked) == []


def test_l010_another_persons_item_does_not_exist(app: Any, ranked: Ranking) -> None:
    kim, lee = Page(app, "kim"), Page(app, "lee")
    state, other = kim.state(), lee.state()
    assert state["item"]["id"] != other["item"]["id"]
    for one in (other["item"]["id"], "8", "", "../8"):
        answer = kim.submit(state, item=one)
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "item")
    assert kim.http.get(f"/rank/item/{other['item']['id']}").status_code == 404
    assert stored(ranked) == []


@pytest.mark.parametrize(
    ("ranks", "field"),
    [
        ([1, 2], "ranks"),
        ([1, 2, 3, 3], "ranks"),
        ([1, 2, 99], "ranks"),
        ([1] * 100_000, "ranks"),
        (["1", 2, 3], "ranks.0"),
        ("123", "ranks"),
        ([1, -2, 3], "ranks"),
        ([1, 2.5, 3], "ranks.1"),
        ([1, True, 3], "ranks.1"),
        ([1, None, 3], "ranks.1"),
        ({"a": 1}, "ranks"),
        ([[1], 2, 3], "ranks.0"),
    ],
)
def test_l011_bad_rank_lists(ranks: Any, field: str, app: Any, ranked: Ranking) -> None:
    page = Page(app, "kim")
    answer = page.submit(page.state(), ranks=ranks)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert stored(ranked) == []


@pytest.mark.parametrize("body", [b'{"item": "x", "verdict": "ranked", "ranks": [NaN, 1, 2]}', b"[]", b"{", b"\xff{}"])
def test_l011_what_is_no_json(body: bytes, app: Any, ranked: Ranking) -> None:
    page = Page(app, "kim")
    headers = {"X-CSRF-Token": page.state()["csrf"], "Content-Type": "application/json"}
    assert page.http.post("/rank/submit", content=body, headers=headers).status_code == 400
    assert stored(ranked) == []


def test_unknown_fields_are_refused(app: Any) -> None:
    page = Page(app, "kim")
    answer = page.submit(page.state(), annotator="lee")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "annotator")


def test_l013_two_tabs_the_first_wins(app: Any, ranked: Ranking) -> None:
    page = Page(app, "kim")
    state = page.state()
    assert page.state() == state  # the other tab
    page.submit(state, ranks=[1, 2, 3])
    late = page.submit(state, ranks=[3, 2, 1])
    assert (late.status_code, late.json()["stored"]) == (409, stored(ranked)[0])
    assert late.json()["error"]["code"] == "stored"
    assert len(stored(ranked)) == 1


def test_l014_no_model_is_named(app: Any, ranked: Ranking) -> None:
    page = Page(app, "kim")
    sent = [page.http.get(path).text for path in ("/rank", "/rank/item", "/pages/rank.js")]
    state = page.state()
    sent.append(page.submit(state).text)
    assert not any("secret" in text for text in sent)
    assert "secret-1" in (ranked.folder / "items.jsonl").read_text()  # kept for who evaluates
    assert "secret" not in ranked.out.read_text()


def test_l016_a_full_disk_is_507_and_the_retry_is_stored(
    app: Any, ranked: Ranking, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Page(app, "kim")
    state = page.state()

    def fails(*_: object) -> int:
        raise OSError(27, "File too large")

    with monkeypatch.context() as patched:
        patched.setattr(disk.Calls, "write", staticmethod(fails))
        refused = page.submit(state)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "E-IO-WRITE")
    assert ranked.out.read_bytes() == b""
    assert page.submit(state).status_code == 200
    assert len(stored(ranked)) == 1


@pytest.mark.parametrize("name", ["", " ", "x" * 65, "a\u202eb", "a\nb", 7, None])
def test_l019_bad_names(name: Any, app: Any) -> None:
    answer = Page(app).enter(name=name)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("name", ["Robert'); DROP", '<b onload="x">', "=HYPERLINK(1)", "=cmd|' /C calc'!A0", "李雷"])
def test_l019_l020_names_are_data(name: str, app: Any, ranked: Ranking) -> None:
    page = Page(app, name)
    state = page.state()
    assert state["name"] == name
    page.submit(state)
    assert stored(ranked)[0]["annotator"] == name


@pytest.mark.parametrize("comment", ["\0", "x" * 2_001])
def test_l022_bad_comments(comment: str, app: Any, ranked: Ranking) -> None:
    page = Page(app, "kim")
    answer = page.submit(page.state(), comment=comment)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "comment")
    assert stored(ranked) == []


def test_l022_half_of_a_surrogate_pair(app: Any, ranked: Ranking) -> None:
    page = Page(app, "kim")
    state = page.state()
    body = json.dumps({"item": state["item"]["id"], "verdict": "skip", "comment": "\ud800"})
    headers = {"X-CSRF-Token": state["csrf"], "Content-Type": "application/json"}
    assert page.http.post("/rank/submit", content=body, headers=headers).status_code == 400
    assert (ranked.folder / "aside.jsonl").read_bytes() == b""


def test_l025_a_control_looks_like_any_other(tmp_path: Path) -> None:
    controls = [Item(item(7).prompt, ("good", "bad", "so so"), ranks=(1, 3, 2))]
    with Ranking(Rank(out=str(tmp_path / "ranked.jsonl")), controls) as ranked:
        ranked.add(item(0))
        ranked._taken[controls[0].id]["kim"], ranked._open["kim"] = ranked.clock(), controls[0].id
        page = Page(app_of(ranked), "kim")
        control = page.state()
        page.submit(control)
        other = page.state()
    assert control["item"]["id"] == controls[0].id
    assert control["item"].keys() == other["item"].keys()
    assert control.keys() == other.keys()
    assert "control" not in json.dumps(control)


def test_l026_a_reload_shows_the_same_item(app: Any) -> None:
    page = Page(app, "kim")
    first = page.state()
    assert page.state() == first
    assert Page(app, "kim").state()["item"] == first["item"]  # another browser of the same person
