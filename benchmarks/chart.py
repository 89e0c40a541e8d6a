"""The bar chart of requests a second, as an SVG that reads well on light and on dark pages."""

from xml.sax.saxutils import escape

from benchmarks.results import TITLES, Medians, Results

WIDTH = 900
LABEL_WIDTH = 350
VALUE_WIDTH = 80
TOP = 64
BAR_HEIGHT = 22
STEP = 34
BOTTOM = 34
OURS = frozenset({"ours", "ours-off"})
STYLE = """
    text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #24292f; }
    .title { font-size: 17px; font-weight: 600; }
    .note { font-size: 12px; fill: #57606a; }
    .ours { fill: #0969da; }
    .peer { fill: #8c959f; }
    .strong { font-weight: 600; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; }
      .note { fill: #9198a1; }
      .ours { fill: #4493f8; }
      .peer { fill: #656c76; }
    }
"""


def svg(results: Results) -> str:
    """One bar a server, the fastest first."""
    medians = Medians(results["hello"])
    rates = sorted(((medians(name, 16), name) for name in results["hello"]), reverse=True)
    scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / rates[0][0]
    height = TOP + STEP * len(rates) + BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title">',
        '  <title id="title">Requests a second, one core, 16 connections</title>',
        f"  <style>{STYLE}  </style>",
        '  <text class="title" x="12" y="26">Requests a second on one core, 16 connections</text>',
        '  <text class="note" x="12" y="46">POST /predict {"text": "Hello"} with keep-alive; more is better</text>',
    ]
    for number, (rate, name) in enumerate(rates):
        y = TOP + STEP * number
        kind, strong = ("ours", ' class="strong"') if name in OURS else ("peer", "")
        middle, end = y + BAR_HEIGHT / 2 + 5, LABEL_WIDTH + rate * scale
        lines += [
            f'  <text{strong} x="{LABEL_WIDTH - 10}" y="{middle:g}" text-anchor="end">{escape(TITLES[name])}</text>',
            f'  <rect class="{kind}" x="{LABEL_WIDTH}" y="{y}" width="{rate * scale:.1f}" '
            f'height="{BAR_HEIGHT}" rx="3"/>',
            f'  <text{strong} x="{end + 8:.1f}" y="{middle:g}">{rate:,.0f}</text>',
        ]
    machine = escape(f"{results['machine']['cpu']}, {results['run']['date']}")
    lines += [
        f'  <text class="note" x="12" y="{height - 12}">{machine}; medians, benchmarks/results.json</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
