"""The look of the report and its one script (sorting of per-layer tables)."""

CSS = """
:root{color-scheme:light dark;--paper:#fcfcfb;--panel:#f3f4f3;--ink:#1b1e22;--muted:#5c646d;--line:#dcdfe0;
--grid:#e6e8e8;--blue:#0a66a8;--orange:#c2500a;--green:#00795c;--purple:#8b3f8f;--dot:#7f96ab;
--pass:#00695c;--fail:#b3261e;--inconclusive:#855600;--unusable:#57596b;--warn:#fdf0e1;--on:#fff}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--panel:#1d2125;--ink:#e7e9ea;--muted:#a2abb3;--line:#343a40;
--grid:#272c31;--blue:#66b2ee;--orange:#f5985a;--green:#4cc9a6;--purple:#d694dc;--dot:#71879b;
--pass:#4fc3b0;--fail:#ff8a80;--inconclusive:#f0bd52;--unusable:#b4b6c8;--warn:#332413;--on:#101214}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif}
main,header,footer{max-width:1100px;margin:0 auto;padding:0 24px}
header{padding-top:32px}
h1{font-size:17px;font-weight:600;margin:0;color:var(--muted)}
h2{font-size:21px;line-height:1.3;margin:52px 0 6px;padding-top:18px;border-top:1px solid var(--line);
letter-spacing:-.01em}
h3{font-size:16px;margin:22px 0 4px}
p{margin:6px 0 12px;max-width:76ch}
a{color:var(--blue)}
small,.note,figcaption{font-size:13.5px;color:var(--muted)}
.note{max-width:88ch}
code{font:13px/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:18px 0 0;font-size:14px}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
.verdict{margin:14px 0 0;padding:20px 24px 18px;border-radius:10px;background:var(--panel);
border-left:8px solid var(--c,var(--unusable))}
.verdict .word{font-size:44px;line-height:1.1;font-weight:750;letter-spacing:-.02em;color:var(--c,var(--unusable))}
.verdict .target{font-size:20px;font-weight:600;line-height:1.35;margin-top:6px;overflow-wrap:anywhere}
.verdict p{margin:4px 0 0}
.v-PASS{--c:var(--pass)}.v-FAIL{--c:var(--fail)}.v-INCONCLUSIVE{--c:var(--inconclusive)}
.v-UNUSABLE,.v-NOT_MEASURED{--c:var(--unusable)}
.heroes{display:grid;grid-template-columns:repeat(3,1fr);gap:16px;margin:16px 0 0}
.hero{padding:14px 18px;border:1px solid var(--line);border-radius:10px}
.hero .label{font-size:13.5px;color:var(--muted)}
.hero .big{font-size:30px;font-weight:680;letter-spacing:-.01em;line-height:1.25}
.hero .big .kind{font-size:12px;vertical-align:middle;letter-spacing:0}
.hero small{display:block;line-height:1.45}
.callout{margin:14px 0;padding:10px 16px;border-left:4px solid var(--orange);background:var(--warn);border-radius:0 8px 8px 0}
.callout p,.callout ul{margin:2px 0}
.callout ul{padding-left:20px}
.chip{display:inline-block;white-space:nowrap;padding:1px 9px;border-radius:99px;font-size:12.5px;font-weight:650;
color:var(--on);background:var(--c);border:1.5px solid var(--c)}
.chip.v-NOT_MEASURED{color:var(--muted);background:none;border-style:dashed}
.kind{display:inline-block;padding:0 7px;border-radius:99px;font-size:11.5px;font-weight:600;line-height:1.55;
border:1.5px solid var(--blue);white-space:nowrap}
.kind.k-measured{background:var(--blue);color:var(--on)}
.kind.k-predicted{color:var(--purple);border-color:var(--purple);border-style:dashed;background:none}
.kind.k-unknown{color:var(--muted);border-color:var(--muted);border-style:dotted;background:none}
.fig .value{white-space:nowrap}
.fig.k-measured .value{font-weight:650}
.fig.k-predicted .value{font-style:italic;color:var(--purple)}
.fig.k-unknown .value{color:var(--muted)}
.scroll{overflow-x:auto;margin:10px 0 6px}
table{border-collapse:collapse;width:100%;font-size:14.5px;line-height:1.45;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:7px 14px 7px 0;border-bottom:1px solid var(--line)}
th:last-child,td:last-child{padding-right:0}
thead th{font-size:13px;font-weight:600;color:var(--muted);vertical-align:bottom;border-bottom:1.5px solid var(--muted)}
table.checks tbody th{min-width:24ch}
tbody th{font-weight:600;overflow-wrap:break-word}
.num{text-align:right}
td.num,.chip{white-space:nowrap}
td small{line-height:1.35}
td .reason{display:inline-block;max-width:44ch;text-align:left}
tr.fallback>*,tr.spared>*{background:var(--warn)}
tr.fallback td:first-child,tr.fallback th,tr.spared th{box-shadow:inset 4px 0 0 var(--orange);padding-left:10px}
tr.target th{box-shadow:inset 4px 0 0 var(--blue);padding-left:10px}
.bar{display:block;height:10px;min-width:1px;border-radius:2px;background:var(--blue);margin-top:6px}
.fallback .bar,.spared .bar{background:repeating-linear-gradient(135deg,var(--orange) 0 5px,transparent 5px 7px),var(--orange);
outline:1px solid var(--orange)}
td.barcell{min-width:90px;width:26%}td.barcell>span{display:block}
.float{color:var(--orange)}
table.layers{font-size:13px}table.layers td:last-child{min-width:24ch}
table.layers th,table.layers td{padding-top:3px;padding-bottom:3px}
table.layers tbody th{font:12px/1.5 ui-monospace,Menlo,Consolas,"Liberation Mono",monospace;
min-width:20ch;max-width:44ch;overflow-wrap:anywhere}
table.layers .bar{margin-top:5px}
th button{all:unset;cursor:pointer}
th button:focus-visible{outline:2px solid var(--blue)}
th[aria-sort=ascending] button::after{content:" ↑"}
th[aria-sort=descending] button::after{content:" ↓"}
details{margin:8px 0;border:1px solid var(--line);border-radius:8px;padding:0 16px}
summary{cursor:pointer;padding:9px 0;font-weight:600}
summary small{font-weight:400}
pre{overflow-x:auto;font:13px/1.5 ui-monospace,Menlo,Consolas,"Liberation Mono",monospace;margin:4px 0 14px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:8px 32px}
figure{margin:14px 0 8px;min-width:0}
figure h3{margin:0 0 6px}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
.narrow{display:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:4px 0 2px;padding:0;list-style:none;font-size:13.5px;color:var(--muted)}
.legend li{display:flex;align-items:center;gap:6px}
.legend svg{width:16px;height:16px;flex:none}
dl{display:grid;grid-template-columns:minmax(9em,max-content) 1fr;gap:3px 20px;margin:8px 0;font-size:14.5px}
dt{color:var(--muted)}dd{margin:0;overflow-wrap:anywhere}
footer{margin-top:56px;padding-bottom:40px;font-size:13.5px;color:var(--muted)}
svg text{font-size:12px;fill:var(--muted)}
svg .strong{fill:var(--ink);font-weight:600}
svg .label{fill:var(--ink);font-weight:600;paint-order:stroke;stroke:var(--paper);stroke-width:4px;stroke-linejoin:round}
svg .halo{paint-order:stroke;stroke:var(--paper);stroke-width:5px;stroke-linejoin:round}
svg .grid{stroke:var(--grid);stroke-width:1}
svg .axis{stroke:var(--muted);stroke-width:1}
svg .lead{stroke:var(--muted);stroke-width:1}
svg .dot{fill:var(--dot);fill-opacity:.6;stroke:var(--paper);stroke-width:.6}
svg .hollow{fill:none;stroke:var(--dot);stroke-width:1.2;stroke-opacity:.8}
svg .c0{fill:var(--blue);stroke:var(--paper);stroke-width:1.5}
svg .c1{fill:var(--orange);stroke:var(--paper);stroke-width:1.5}
svg .c2{fill:var(--green);stroke:var(--paper);stroke-width:1.5}
svg .c3{fill:var(--purple);stroke:var(--paper);stroke-width:1.5}
svg .open{fill:var(--paper);stroke:var(--purple);stroke-width:2;stroke-dasharray:3 2}
svg .soft{fill-opacity:.55}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round}
svg .front{stroke:var(--dot);stroke-width:1.5;stroke-dasharray:5 3}
svg .l0{stroke:var(--blue)}svg .l1{stroke:var(--orange);stroke-dasharray:6 3}svg .l2{stroke:var(--green)}
svg .l3{stroke:var(--purple);stroke-dasharray:2 3}
svg .whisker{stroke-width:2.5;stroke-dasharray:none}
svg .limit{stroke:var(--fail);stroke-width:1.5}
svg .reference{stroke:var(--muted);stroke-width:1.2;stroke-dasharray:4 3}
svg .limit-text{fill:var(--fail);font-weight:600}
@media (max-width:760px){
main,header,footer{padding-left:16px;padding-right:16px}
header{padding-top:18px}
.pair,.heroes{grid-template-columns:1fr}
.heroes{gap:10px}
.verdict{padding:16px}
.verdict .word{font-size:36px}
.wide{display:none}.narrow{display:block}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}
table.stack thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
table.stack,table.stack tbody,table.stack tr,table.stack th,table.stack td{display:block}
table.stack tr{padding:8px 0;border-bottom:1px solid var(--line)}
table.stack th,table.stack td{border:0;padding:1px 0;text-align:left}
table.stack td{display:flex;justify-content:space-between;gap:16px}
table.stack td::before{content:attr(data-label);color:var(--muted);flex:none}
table.stack td.empty{display:none}
table.layers{min-width:860px}
table.stack td.num{white-space:normal}
table.stack td>span{text-align:right;min-width:0;overflow-wrap:anywhere}
table.stack td .reason{text-align:right}
table.stack td:not([data-label])::before{content:none}
tr.target th,table.stack tr.fallback th{padding-left:10px}
}
@media print{
:root{--paper:#fff;--panel:#f4f4f4;--ink:#000;--muted:#444;--line:#ccc;--grid:#e4e4e4;--blue:#0a66a8;--orange:#c2500a;
--green:#00795c;--purple:#8b3f8f;--pass:#00695c;--fail:#b3261e;--inconclusive:#855600;--unusable:#57596b;--warn:#fdf0e1;
--on:#fff}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{font-size:11pt}nav{display:none}
h2{break-after:avoid}figure,tr,.hero,.verdict{break-inside:avoid}
details::details-content{content-visibility:visible;block-size:auto}
}
"""

SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.textContent) return;
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') !== 'descending';
      for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const key = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
      const order = (a, b) => key(a).localeCompare(key(b), undefined, {numeric: true});
      const numeric = (a, b) => Number(key(a)) - Number(key(b));
      const rows = [...body.rows];
      const by = rows.every(row => key(row) !== '' && !Number.isNaN(Number(key(row)))) ? numeric : order;
      rows.sort((a, b) => (down ? -1 : 1) * by(a, b));
      body.append(...rows);
    });
  });
}
"""
