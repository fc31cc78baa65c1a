"""The HTML around a report.

No fonts, scripts or pictures from elsewhere: it opens without a network.
"""

import string

PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d9dee3; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 Inter, "Helvetica Neue",
  "Segoe UI", "DejaVu Sans", Arial, sans-serif; font-feature-settings: "tnum"; }
main { max-width: 980px; margin: 0 auto; padding: 56px 40px 96px; }
.kicker { color: var(--soft); font-size: 13.5px; letter-spacing: .02em; margin: 0 0 6px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 22px; }
.verdict { font-size: 18.5px; line-height: 1.5; margin: 0 0 22px; padding: 2px 0 2px 20px;
  border-left: 4px solid var(--accent); }
h2 { font-size: 21px; letter-spacing: -.01em; margin: 64px 0 10px; padding-top: 22px;
  border-top: 1px solid var(--line); }
p.note { color: var(--soft); margin: 0 0 18px; font-size: 14.5px; }
figure { margin: 26px 0 30px; }
figure svg { width: 100%; height: auto; display: block; }
figcaption, p.caption { color: var(--soft); font-size: 13.5px; line-height: 1.5; margin: 10px 0 0;
  max-width: 780px; }
.wide { overflow-x: auto; margin-top: 26px; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--soft); font-size: 12.5px;
  border-bottom: 1.5px solid var(--ink); }
th, td { text-align: right; padding: 6px 0 6px 14px; vertical-align: baseline; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { border-bottom: 1px solid #eef1f4; white-space: nowrap; }
table.claims { width: auto; font-size: 13.5px; margin: 0 0 8px; }
table.claims td, table.claims th { padding: 3px 0 3px 20px; text-align: left; }
table.claims td:first-child { font-weight: 600; padding-left: 0; }
table.claims td:last-child, table.claims th:last-child { text-align: right; }
tr.holds td:first-child { color: #00664b; }
tr.holds td:first-child::before { content: "✓ "; }
tr.fails td:first-child { color: #b3261e; }
tr.fails td:first-child::before { content: "✗ "; }
.failed { border: 1px solid #e3b7b3; background: #fdf3f2; border-radius: 6px; padding: 12px 18px;
  font-size: 14px; margin: 18px 0; }
.failed ul { margin: 6px 0 0; padding-left: 20px; }
details { margin-top: 48px; }
summary { cursor: pointer; font-weight: 600; }
pre { background: #f4f6f8; border-radius: 6px; padding: 12px 16px; overflow-x: auto;
  font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; }
@media (max-width: 640px) { main { padding: 28px 18px 60px; } h1 { font-size: 27px; } }
@media print { main { padding: 0; } figure, table { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<p class="kicker">$kicker</p>
<h1>$title</h1>
<p class="verdict">$verdict</p>
$claims
$failed
$body
</main>
</body>
</html>
""")
