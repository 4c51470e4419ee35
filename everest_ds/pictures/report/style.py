"""Style sheet of the page: light or dark as the reader's system, light when printed, one column on a phone."""

_LIGHT = """
--paper:#fff;--ink:#1d1f23;--faint:#5a6068;--rule:#d9dce1;--panel:#f5f6f8;--accent:#0060a8;--marked:#fff3d6;
--good:#00703c;--busy:#0060a8;--bad:#b3261e;
--c0:#0060a8;--c1:#d55e00;--c2:#00805c;--c3:#a8327d;--c4:#8a6d00;--c5:#3d9bd6;--c6:#30303a;--c7:#7a5cc7;
"""
_DARK = """
--paper:#15181c;--ink:#e6e8eb;--faint:#a3aab3;--rule:#363c44;--panel:#1e2328;--accent:#6cb8f0;--marked:#3a3115;
--good:#5cd692;--busy:#6cb8f0;--bad:#ff8a80;
--c0:#56b4e9;--c1:#ff8c42;--c2:#2fd0a0;--c3:#f08cc8;--c4:#e3c04f;--c5:#a9dcff;--c6:#f2f2f2;--c7:#b7a2ff;
"""
_COLOURS = "".join(f".c{place}{{--line:var(--c{place})}}" for place in range(8))
_PATTERNS = ("9 3", "3 3", "10 3 2 3")
_DASHES = "".join(f".d{place} .line{{stroke-dasharray:{dash}}}" for place, dash in enumerate(_PATTERNS, 1))

STYLE = f"""
:root{{color-scheme:light;{_LIGHT}}}
@media screen and (prefers-color-scheme:dark){{:root{{color-scheme:dark;{_DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:76rem;padding:1rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
h1{{margin:.2rem 0;font-size:1.6rem;overflow-wrap:anywhere}}
h2{{margin:2.2rem 0 .6rem;padding-bottom:.2rem;border-bottom:1px solid var(--rule);font-size:1.25rem}}
h3{{margin:1.2rem 0 .4rem;font-size:1rem;overflow-wrap:anywhere}}
p{{margin:.4rem 0}}header p,.notes,figcaption,caption{{color:var(--faint)}}figcaption strong{{color:var(--ink)}}
a{{color:var(--accent)}}nav{{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.6rem 0}}
pre{{overflow-x:auto;padding:.6rem;background:var(--panel);font-size:.85rem}}
.legend{{display:flex;flex-wrap:wrap;gap:.2rem 1.4rem;margin:.5rem 0;padding:0;list-style:none}}
li{{overflow-wrap:anywhere}}
.swatch{{width:2rem;height:.75rem;margin-right:.4rem;vertical-align:baseline}}
.line{{fill:none;stroke:var(--line);stroke-width:2;stroke-linejoin:round}}
.band{{fill:var(--line);opacity:.22}}
.dots{{fill:none;stroke:var(--line);stroke-width:5;stroke-linecap:round}}
{_COLOURS}{_DASHES}
.state{{padding:0 .45rem;border:1px solid;border-radius:.7rem;font-size:.85rem;white-space:nowrap}}
.good{{color:var(--good)}}.busy{{color:var(--busy)}}.bad{{color:var(--bad)}}
.charts{{display:grid;gap:1.2rem;margin-top:.6rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr))}}
figure{{margin:0}}.chart>svg{{display:block;width:100%;height:auto}}
.grid{{stroke:var(--rule);stroke-width:1}}
.tick{{fill:var(--faint);font-size:12px}}.mid{{text-anchor:middle}}.end{{text-anchor:end}}
#axis-share:checked~.by-step,#axis-step:checked~.by-share{{display:none}}
label{{margin:0 1rem 0 .3rem}}
.scroll{{overflow-x:auto;margin:.5rem 0}}
table{{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.25rem .7rem .25rem 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;
overflow-wrap:anywhere;min-width:5rem;max-width:26rem}}
thead th{{white-space:nowrap}}.runs thead th{{white-space:normal}}.number{{min-width:3rem}}
.runs td,.runs thead th{{min-width:8rem}}.number{{text-align:right}}
tbody th{{font-weight:500;color:var(--faint);min-width:9rem}}
.differs{{background:var(--marked)}}.differs th{{color:var(--ink)}}
.mark{{margin-left:.4rem;color:var(--bad);font-weight:700}}
.only:checked~.scroll .same{{display:none}}
.matrix .cell{{min-width:2.2rem;padding:.2rem;text-align:center;border:1px solid var(--rule);
background:color-mix(in srgb,var(--accent) calc(var(--share)*.55),var(--paper))}}
.matrix thead th{{min-width:0;padding:.2rem;text-align:center}}.matrix caption{{text-align:left;padding:.3rem 0}}
.pictures{{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr));align-items:start}}
.picture img{{max-width:100%;height:auto;background:#fff;border:1px solid var(--rule)}}
summary{{cursor:pointer;margin:.4rem 0;overflow-wrap:anywhere}}
@media (max-width:600px){{body{{padding:.7rem}}.tick{{font-size:16px}}.line{{stroke-width:2.6}}}}
@media print{{nav,input,label{{display:none}}body{{max-width:none}}.scroll{{overflow:visible}}
figure,tr{{break-inside:avoid}}}}
"""
