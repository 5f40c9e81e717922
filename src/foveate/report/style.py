"""The style sheet of the report: one column, system fonts, digits of equal width, light or dark by preference."""

from __future__ import annotations

from foveate.report.palette import LEVEL_COLOURS

_LEVELS = "".join(f".l{level}{{background:{colour}}}" for level, colour in LEVEL_COLOURS.items())

CSS = (
    """
:root{color-scheme:light dark;--page:#fbfaf8;--card:#ffffff;--ink:#1d2026;--soft:#626873;--line:#e3e1dc;
  --track:#efede8;--accent:#c2410c;--curve:#33638d}
@media (prefers-color-scheme:dark){:root{--page:#14161b;--card:#1c1f26;--ink:#e8e6e1;--soft:#9aa1ad;--line:#2e323b;
  --track:#2a2e37;--accent:#fb923c;--curve:#7fb0dd}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
  -webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:44px 24px 64px}
header p.kicker{margin:0;color:var(--accent);font-size:12px;font-weight:600;letter-spacing:.09em;
  text-transform:uppercase}
h1{margin:2px 0 4px;font-size:30px;line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{margin:0 0 4px;font-size:19px;letter-spacing:-.005em}
p{margin:0 0 12px;max-width:76ch}
.soft,header p.sub{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:12px;margin:22px 0 34px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card b{display:block;font-size:25px;line-height:1.2;font-weight:600;letter-spacing:-.02em;
  font-variant-numeric:tabular-nums}
.card b small{font-size:14px;font-weight:500;letter-spacing:0;color:var(--soft)}
.card span{display:block;font-size:13px;color:var(--soft);line-height:1.4;margin-top:3px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px 24px;
  margin-bottom:22px}
.legends{display:flex;flex-wrap:wrap;gap:6px 34px;justify-content:space-between;margin:14px 0 12px}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;align-items:center;font-size:13px;color:var(--soft)}
.key{display:inline-flex;align-items:center;gap:6px;color:var(--ink)}
.num{color:var(--soft);font-variant-numeric:tabular-nums}
.swatch{width:13px;height:13px;border-radius:3px;display:inline-block}
.ramp{display:inline-block;width:110px;height:11px;border-radius:3px}
.picture{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
table.map{table-layout:fixed;margin-bottom:8px;min-width:calc(262px + var(--columns)*70px + var(--strip)*15px)}
table.map th{font-weight:400;font-size:12.5px;color:var(--soft);text-align:left;overflow:hidden;
  text-overflow:ellipsis;white-space:nowrap;padding:0 10px 0 0}
table.map thead th{font-size:12px;padding-bottom:3px}
table.map .mean{text-align:right;padding-right:0}
table.map tr>:first-child{width:200px}
table.map .mean{width:52px}
table.map .strip{width:calc(12px + var(--strip)*15px);padding:0 0 0 14px;overflow:visible}
table.map td{padding:1.5px 10px 1.5px 0;height:18px}
table.map td.mean{font-size:12.5px;color:var(--soft)}
table.map tbody tr:hover th,table.map tbody tr:hover td.mean{color:var(--ink)}
.bar{display:flex;height:13px;border-radius:3px;overflow:hidden;background:var(--track);min-width:0}
.bar i{display:block;min-width:0}
.heats{display:flex;gap:2px}
.heats i{width:13px;height:13px;border-radius:3px;flex:none}
svg.chart{display:block;width:100%;min-width:600px;height:auto;margin:12px 0 4px;
  font:13px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
.plot .grid{stroke:var(--line);stroke-width:1}
.plot .tick{fill:var(--soft);font-size:12px}
.plot .axis{fill:var(--soft);font-size:12.5px}
.plot .frontier{fill:none;stroke:var(--curve);stroke-width:2.25;stroke-linejoin:round}
.plot .uniform{fill:var(--soft)}
.plot .chosen{fill:var(--accent)}
.plot .chosen text{font-weight:600}
.plot .measured circle{fill:none;stroke:var(--ink);stroke-width:1.8}
.plot .measured line{stroke:var(--ink);stroke-width:1.5}
.plot .measured text{fill:var(--ink)}
svg.heat .tick{fill:var(--soft);font-size:11px}
svg.heat .name{fill:var(--soft);font-size:10.5px}
svg.heat .mark{stroke:var(--accent);stroke-width:1.6}
.words{max-width:none;line-height:2}
.words span{padding:2px 3px;border-radius:3px;white-space:pre-wrap}
.mark{width:16px;height:14px;display:inline-block;vertical-align:-2px}
.scroll{overflow-x:auto}
table.figures{margin-top:12px;font-size:14px}
table.figures th{font-weight:500;color:var(--soft);font-size:12.5px;text-align:right;padding:4px 0 6px 18px;
  white-space:nowrap;border-bottom:1px solid var(--line)}
table.figures td{text-align:right;padding:6px 0 6px 18px;border-bottom:1px solid var(--line);white-space:nowrap}
table.figures th:first-child,table.figures td:first-child{text-align:left;padding-left:0}
table.figures tr.chosen td{font-weight:600}
table.figures tr.chosen td:first-child{color:var(--accent)}
table.figures tbody tr:last-child td{border-bottom:0}
ul{margin:8px 0 0;padding-left:20px}
li{overflow-wrap:anywhere}
footer{color:var(--soft);font-size:13px}
@media (max-width:640px){main{padding:26px 12px 40px}section{padding:16px 14px}h1{font-size:25px}
  table.map tr>:first-child{width:124px}}
@media print{body{background:#fff}section,.card{break-inside:avoid}}
"""
    + _LEVELS
    + "\n.l0{background:repeating-linear-gradient(135deg,#b4b8c0 0 3px,#8d929c 3px 5px)}"
)
