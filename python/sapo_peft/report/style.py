"""The style sheet: light and dark, narrow and wide, screen and paper.

Palettes are dictionaries so that a test can compute contrasts. The heat map's scale has one hue and a lightness that
only falls, so it reads the same with every kind of colour vision; its figures are black or white, whichever is
further from the cell.
"""

from __future__ import annotations

STEPS = 20
LIGHT = {
    "bg": "#fbfbf9",
    "card": "#ffffff",
    "fg": "#1b1f24",
    "muted": "#56606b",
    "line": "#d8dce0",
    "grid": "#e8eaec",
    "faint": "#a9b1ba",
    "accent": "#1f5f99",
    "other": "#a3480a",
    "soft": "#eef3f8",
    "warn": "#fdf3e1",
}
DARK = {
    "bg": "#15181c",
    "card": "#1b1f24",
    "fg": "#e4e7ea",
    "muted": "#a5aeb8",
    "line": "#373e46",
    "grid": "#2a3037",
    "faint": "#69737e",
    "accent": "#7db3e8",
    "other": "#f0a35e",
    "soft": "#202933",
    "warn": "#352b17",
}
RAMP_LIGHT = ("#f4f7fa", "#b7d1e8", "#5d97c8", "#215f99", "#0a3157")
RAMP_DARK = ("#1f262e", "#1f476c", "#2f78ae", "#73b0e0", "#cfe6fa")


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def ramp(stops: tuple[str, ...]) -> list[tuple[str, str]]:
    """(colour of the cell, colour of its figure) for each of `STEPS` + 1 steps."""
    colours = []
    for step in range(STEPS + 1):
        place = step / STEPS * (len(stops) - 1)
        left = min(int(place), len(stops) - 2)
        ends = [[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops[left : left + 2]]
        mixed = [round(a + (b - a) * (place - left)) for a, b in zip(*ends, strict=True)]
        colour = "#" + "".join(f"{part:02x}" for part in mixed)
        colours.append((colour, max("#000000", "#ffffff", key=lambda ink, c=colour: contrast(ink, c))))
    return colours


def _palette(colours: dict[str, str], stops: tuple[str, ...]) -> str:
    heat = "".join(f"--h{i}:{cell};--i{i}:{ink};" for i, (cell, ink) in enumerate(ramp(stops)))
    return "".join(f"--{name}:{value};" for name, value in colours.items()) + heat


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--fg);overflow-wrap:anywhere;
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
 "Noto Sans","Liberation Sans",Arial,sans-serif}
main,header,footer{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
footer{padding-bottom:48px;color:var(--muted);font-size:14px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;font-weight:650;letter-spacing:-.01em}
h2{font-size:22px;line-height:1.3;margin:56px 0 12px;padding-top:14px;border-top:1px solid var(--line);font-weight:650}
h3{font-size:17px;line-height:1.35;margin:32px 0 8px;font-weight:650}
h4{font-size:15px;line-height:1.4;margin:20px 0 6px;font-weight:650}
p{margin:8px 0;max-width:76ch}
ul{margin:8px 0;padding-left:22px}
a{color:var(--accent)}
.lead{font-size:17px;color:var(--muted);margin:0 0 4px}
.note,figcaption,caption{color:var(--muted);font-size:14px;line-height:1.45}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;padding:0;margin:18px 0 0;font-size:15px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:18px 0;padding:0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.cards dt{color:var(--muted);font-size:14px;line-height:1.35}
.cards dd{margin:2px 0 0;font-size:25px;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums}
.cards dd small{font-size:14px;font-weight:400;color:var(--muted)}
.facts{display:grid;grid-template-columns:max-content 1fr;gap:3px 20px;margin:14px 0;font-size:15px}
.facts dt{color:var(--muted)}
.facts dd{margin:0}
.status{background:var(--warn);border-left:4px solid var(--other);padding:10px 14px;border-radius:0 6px 6px 0}
.verdict p,.verdict ul{margin:4px 0}
.verdict li{margin:6px 0;max-width:100ch}
.verdict p{max-width:100ch}
.verdict{background:var(--soft);border-left:4px solid var(--accent);padding:10px 14px;border-radius:0 6px 6px 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:8px 20px;margin:8px 0 4px}
.pair>div{min-width:0}
.label{font-size:14px;color:var(--muted);margin:0 0 4px}
.label b{color:var(--fg);font-weight:600}
.prompt{white-space:pre-wrap;overflow:auto;max-height:20em;background:var(--card);border:1px solid var(--line);
 border-radius:6px;padding:10px 14px;font-size:15px;line-height:1.5}
.chosen .prompt{border-left:4px solid var(--accent)}
.esc{font:12px/1.3 ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;color:var(--other);
 border:1px solid var(--line);border-radius:3px;padding:0 3px}
.scroll{overflow-x:auto;margin:12px 0}
table{border-collapse:collapse;font-size:14px;line-height:1.4;font-variant-numeric:tabular-nums lining-nums;
 overflow-wrap:normal}
caption{text-align:left;padding:0 0 6px}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}
th.text,td.text{text-align:left}
thead th{color:var(--muted);font-weight:500;vertical-align:bottom}
tbody th{font-weight:500}
td.wide,td .wide{white-space:normal}
td .wide{display:block;min-width:240px;max-width:76ch;overflow-wrap:anywhere}
td ul{margin:0;padding-left:18px;white-space:normal;min-width:240px;overflow-wrap:anywhere}
tr.total th,tr.total td{border-top:2px solid var(--line);font-weight:600}
table.heat{border-collapse:separate;border-spacing:2px}
.heat td{min-width:54px;text-align:center;border:0;border-radius:3px;padding:6px 5px;vertical-align:middle;
 -webkit-print-color-adjust:exact;print-color-adjust:exact}
.heat th{border:0;vertical-align:middle}
.heat thead th{text-align:center}
.heat thead th.text{text-align:left}
.maps{display:flex;flex-wrap:wrap;gap:0 40px}
.maps>*{max-width:100%}
table wbr{display:none}
.heat wbr{display:inline}
.heat tbody th{white-space:normal;min-width:150px;max-width:230px;overflow-wrap:anywhere}
.heat td.none{color:var(--muted);border:1px dashed var(--line)}
.heat td.own{outline:2px solid var(--fg);outline-offset:-2px;font-weight:700}
.heat td.ahead{font-style:italic}
.range{white-space:nowrap}
.scale{display:inline-flex;vertical-align:-2px;margin:0 6px}
.scale i{width:11px;height:14px;-webkit-print-color-adjust:exact;print-color-adjust:exact}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,352px),1fr));gap:20px 24px;margin:12px 0}
.charts>*{min-width:0}
.charts h4{margin-top:0}
figure{margin:0;max-width:460px}
figure.full{max-width:none}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--muted);font-variant-numeric:tabular-nums;unicode-bidi:isolate}
svg .strong{fill:var(--fg);font-weight:600}
svg .t-accent{fill:var(--accent);font-weight:600}
svg .t-other{fill:var(--other);font-weight:600}
.gridline{stroke:var(--grid)}
.axis{stroke:var(--line)}
.zero{stroke:var(--muted)}
.faint{stroke:var(--faint);stroke-width:1;fill:none;opacity:.75}
.used{stroke:var(--accent);stroke-width:1.2;fill:none}
.original{stroke:var(--other);stroke-width:1.8;fill:none;stroke-dasharray:5 3}
.path{stroke:var(--accent);stroke-width:3.5;fill:none;stroke-linecap:round;stroke-linejoin:round}
.path-lead{stroke:var(--accent);stroke-width:1}
.original-lead{stroke:var(--other);stroke-width:1;stroke-dasharray:5 3}
.switch{stroke:var(--fg);stroke-width:1;stroke-dasharray:2 3}
.dot{fill:var(--faint)}
.dot-accent,.bar-accent{fill:var(--accent)}
.dot-other{fill:var(--other)}
.bar{fill:var(--faint)}
.bar-other{fill:var(--other)}
.ring{fill:var(--card);stroke:var(--fg);stroke-width:1.2}
.whisker{stroke:var(--fg);stroke-width:2}
.seg0{fill:var(--accent)}
.seg1{fill:var(--faint)}
.seg2{fill:var(--other)}
td svg{width:170px;height:22px}
details{margin:10px 0}
summary{cursor:pointer;color:var(--accent);font-size:15px}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
@media (max-width:560px){
 main,header,footer{padding-left:16px;padding-right:16px}
 header{padding-top:24px}
 h1{font-size:25px}
 h2{margin-top:44px;font-size:20px}
 .facts{grid-template-columns:1fr;gap:0}
 .facts dd{margin-bottom:8px}
 .cards{grid-template-columns:1fr 1fr}
 .cards dd{font-size:21px}
}
@media print{
 @page{margin:15mm}
 body{font-size:10.5pt;background:#fff}
 main,header,footer{max-width:none;padding:0}
 nav{display:none}
 h2{margin-top:24pt}
 h2,h3,h4{break-after:avoid}
 .charts,.pair{grid-template-columns:1fr 1fr}
 .maps{display:block}
 .maps .scroll{display:inline-block;vertical-align:top;margin-right:24px;break-inside:avoid}
 .scroll{overflow:visible}
 table{font-size:8.5pt}
 th,td{padding:3px 5px;white-space:normal}
 td .wide,td ul{min-width:0}
 table.heat td{min-width:0}
 table wbr{display:inline}
 .prompt{max-height:none;overflow:visible}
 figure,tr,.cards div,.pair>div{break-inside:avoid}
 svg,.status,.verdict{-webkit-print-color-adjust:exact;print-color-adjust:exact}
}
"""

_CELLS = "".join(f".h{i}{{background:var(--h{i});color:var(--i{i})}}" for i in range(STEPS + 1))


def style_sheet() -> str:
    """The whole sheet. Paper is light, whatever the screen is."""
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{_palette(DARK, RAMP_DARK)}}}}}"
    return f":root{{color-scheme:light;{_palette(LIGHT, RAMP_LIGHT)}}}\n{dark}{_RULES}{_CELLS}\n"
