"""Pages as a real browser lays them out: headless Chromium, where it is installed."""

import html
import json
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
PHONE, SCREENS = 390, (1200, 1600)
_MEASURE = """
<script>
const told = [...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach(each => { each.open = true; });
  const tables = [...page.querySelectorAll("table")].map(table => {
    const box = table.closest(".scroll"), edges = box.getBoundingClientRect();
    const heads = [...table.querySelectorAll("th")];
    return {heads: heads.map(head => head.textContent), ends: heads.map(head => head.getBoundingClientRect().right),
      left: edges.left, right: edges.right, table: table.offsetWidth, box: box.clientWidth,
      scrolls: getComputedStyle(box).overflowX};
  });
  return {page: root.scrollWidth, view: root.clientWidth, tables: tables,
    pictures: [...page.querySelectorAll("img")].map(each => each.getBoundingClientRect().right)};
});
document.body.textContent = JSON.stringify(told);
</script>
"""


def layout(path, folder):
    """Width in pixels → how a page is laid out there, all that is folded in it unfolded.

    Args:
        path: HTML file.
        folder: for what the browser needs.
    """
    content, widths = html.escape(path.read_text(encoding="utf-8")), (PHONE, *SCREENS)
    frames = (f'<iframe width="{width}" height="900" frameborder="0" srcdoc="{content}"></iframe>' for width in widths)
    # The script runs when the frames are there.
    script = _MEASURE.replace("<script>", "<script>addEventListener('load', () => {").replace(
        "</script>", "})</script>"
    )
    (folder / "frames.html").write_text(f'<meta charset="utf-8"><body>{"".join(frames)}{script}', encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--no-first-run",
        f"--user-data-dir={folder / 'browser'}",
    ]
    command = [CHROMIUM, *flags, "--dump-dom", (folder / "frames.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    told = html.unescape(shown.partition("<body>")[2].partition("</body>")[0])
    return dict(zip(widths, json.loads(told), strict=True))


def check_layout(path, folder, verdict=True):
    """Nothing of a page is wider than its window, at a phone's width and at a screen's.

    Args:
        path: HTML file.
        folder: for what the browser needs.
        verdict: whether the page has one, which must be seen without scrolling.
    """
    for width, found in layout(path, folder).items():
        assert found["page"] <= found["view"] == width
        assert all(right <= width for right in found["pictures"])
        assert found["tables"]
        for table in found["tables"]:
            assert 0 <= table["left"] <= table["right"] <= width
            assert table["table"] <= table["box"] or table["scrolls"] == "auto"
        first = found["tables"][0]
        if width in SCREENS:
            assert first["table"] <= first["box"], f"at {width} px {first}"
        if verdict:
            place = first["heads"].index("verdict")
            assert first["ends"][place] <= first["right"], f"at {width} px {first}"
