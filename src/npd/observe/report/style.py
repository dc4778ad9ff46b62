"""The look of the report: one style sheet, light and dark from the same named colours.

c1 to c6 are the colours of series and kinds of work; every chart takes its colours from them.
"""

CSS = """
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#ffffff;--ink:#1c2127;--soft:#5d6672;
--line:#e4e5e3;--grid:#ecedeb;--c1:#2b6cd4;--c2:#d9730d;--c3:#15876b;--c4:#a23fa0;--c5:#c43c35;--c6:#9aa1ab;
--good:#13795b;--bad:#b8342d;--shade:#15876b1c;--code:#f3f3f0}
@media (prefers-color-scheme:dark){:root{--bg:#0f1215;--card:#171b20;--ink:#e6e9ec;--soft:#98a2ae;
--line:#2a3037;--grid:#232930;--c1:#6ea8ff;--c2:#f2a04a;--c3:#45c7a0;--c4:#d987d6;--c5:#f27c74;
--c6:#7b8490;--good:#52d3a9;--bad:#ff8d84;--shade:#45c7a024;--code:#1e242a}}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Inter,Arial,sans-serif;font-variant-numeric:tabular-nums}
main,header{max-width:1180px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:0 0 6px}
h2{font-size:20px;letter-spacing:-.01em;margin:52px 0 4px;scroll-margin-top:16px}
h3{font-size:14.5px;margin:0;font-weight:600}
p{margin:0 0 12px;max-width:78ch}
.soft,.intro{color:var(--soft)}
.intro{margin-bottom:16px}
.eyebrow{font-size:12px;font-weight:600;letter-spacing:.09em;text-transform:uppercase;color:var(--c1);
margin:0 0 8px}
.warning{margin:14px 0 0;padding-left:12px;border-left:3px solid var(--bad)}
.lead{font-size:18px;line-height:1.5;margin:18px 0 0;max-width:70ch}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:22px 0 0;padding:12px 0;
border-block:1px solid var(--line);font-size:14px}
a{color:inherit;text-decoration-color:var(--c6);text-underline-offset:3px}
a:hover{color:var(--c1)}
nav a{text-decoration:none;color:var(--soft)}
.grid{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(158px,1fr))}
section>:nth-child(n+4){margin-top:16px}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:0;
padding:16px 18px;min-width:0}
.tile b{display:block;font-size:23px;line-height:1.25;letter-spacing:-.01em;font-weight:600}
.tile i{font-style:normal;font-size:14px;font-weight:500;color:var(--soft);letter-spacing:0}
.tile span{font-size:13px;color:var(--soft)}
.tile small{display:block;font-size:12.5px;color:var(--soft);margin-top:2px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14.5px}
th,td{text-align:left;padding:8px 14px 8px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
th{font-size:12.5px;font-weight:600;color:var(--soft)}
.num{text-align:right;white-space:nowrap}
td.num:last-child,th.num:last-child{padding-right:0}
td.big{font-size:17px;font-weight:600}
td small{display:block;color:var(--soft);font-size:12.5px;font-weight:400}
.good{color:var(--good)}.bad{color:var(--bad)}
figure{display:flex;flex-direction:column}
figcaption{font-size:13px;color:var(--soft);margin-top:8px}
figure svg{display:block;width:100%;height:auto;min-width:400px}
figure.wide svg{min-width:760px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;color:var(--soft);margin:4px 0 8px}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;
background:currentColor;vertical-align:-1px}
.legend b{color:var(--ink);font-weight:600}
.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}
.c6{color:var(--c6)}
figure>h3+.scroll{margin-top:14px}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Inter,Arial,sans-serif;
fill:var(--soft);font-variant-numeric:tabular-nums}
svg .name{fill:var(--ink);font-size:12.5px}
svg .value{fill:var(--ink)}
svg .rulelabel{font-size:11.5px;paint-order:stroke;stroke:var(--card);stroke-width:3px}
svg .grid{stroke:var(--grid);stroke-width:1}
svg .base{stroke:var(--c6);stroke-width:1}
svg .line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .faint{stroke-width:1;opacity:.28}
svg .dot,svg .fill{fill:currentColor}
svg .rule{stroke:var(--ink);stroke-width:1.2;stroke-dasharray:5 4}
svg .rule.alarm{stroke:var(--bad)}
svg text.alarm{fill:var(--bad)}
svg .rule.light{stroke:var(--c6);stroke-dasharray:2 3}
svg .marker{stroke:var(--c6);stroke-width:1;stroke-dasharray:2 3}
svg .shade{fill:var(--shade)}
svg .hit{fill:transparent}
svg .guide{stroke:var(--c6);opacity:0;pointer-events:none}
svg .hover:hover .guide{opacity:.8}
svg .mark:hover .fill,svg .block:hover{opacity:.75}
.note{border:1px dashed var(--line);border-radius:10px;padding:14px 18px;color:var(--soft);margin:0;
max-width:none}
.example{display:flex;flex-direction:column;gap:8px}
.example header{all:unset;display:flex;flex-wrap:wrap;gap:4px 10px;align-items:baseline;
font-size:13px;color:var(--soft)}
.badge{font-size:12px;
font-weight:600;border:1px solid currentColor;border-radius:99px;padding:0 9px}
.label{font-size:13px;color:var(--soft);margin-bottom:-4px}
.q{color:var(--soft);font-size:13.5px}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,SFMono-Regular,
Menlo,Consolas,"DejaVu Sans Mono",monospace;max-height:15em;overflow:auto}
pre.r{background:var(--code);border-radius:7px;padding:10px 12px}
.stack{display:flex;height:14px;border-radius:7px;overflow:hidden;background:var(--grid);
margin:12px 0 10px}
.stack span{background:currentColor;min-width:1px}
.equation{font-size:16.5px;display:flex;flex-wrap:wrap;gap:2px 10px;align-items:baseline}
.equation small{color:var(--soft);font-size:13px}
details{margin-top:12px}
summary{cursor:pointer;font-weight:600;font-size:14.5px}
.config td{padding:4px 14px 4px 0;font-size:13.5px;overflow-wrap:anywhere}
.config code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.set td:nth-child(2){font-weight:600}
footer{max-width:1180px;margin:56px auto 40px;padding:0 24px;color:var(--soft);font-size:13px}
@media (max-width:560px){main,header,footer{padding-inline:14px}h1{font-size:25px}.card,figure{
padding:14px}table{font-size:13.5px}td.big{font-size:15px}th,td{padding-right:10px}}
@media print{figure,.card{break-inside:avoid}nav{display:none}}
"""
