"""A browser, a folder over http, and what a page holds, for the tests of pages."""

import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def copyfile(self, source, outputfile) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # a page that was left while it was loading
            super().copyfile(source, outputfile)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of this machine; gives the address, without a slash at its end."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def chromium() -> Iterator:
    """Start Chromium without a window, for as long as it is needed; the test is skipped where there is none."""
    with pytest.importorskip("playwright.sync_api").sync_playwright() as play:
        path = next(filter(None, map(shutil.which, BROWSERS)), play.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("no Chromium: install chromium, or run `playwright install chromium`")
        running = play.chromium.launch(executable_path=path, args=QUIET)
        yield running
        running.close()


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.texts = [], "", defaultdict(list)
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data
        if self.tags and data.strip():
            self.texts[self.tags[-1][0]].append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def is_inert(page: Page) -> bool:
    """No element that runs or fetches, and no handler."""
    handlers = any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    return not handlers and not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}


def is_safe(page: Page) -> bool:
    """Also nothing fetched: pictures inside, links within the page."""
    inside = all(a["src"].startswith("data:image/png;base64,") and a["alt"] for a in page.named("img"))
    return inside and all(a["href"].startswith("#") for a in page.named("a")) and is_inert(page)
