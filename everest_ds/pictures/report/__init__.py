"""A page about runs: one HTML file that needs no network and no script.

contents      what a page shows, as plain data
markup        elements of HTML; whatever text they hold is escaped
curves        curves of several runs in one SVG
tables        tables: plain ones, and runs side by side with the differing rows marked
confusion     which classes are taken for which
embedding     pictures as data URIs of a bounded size
sections      the parts of the page
page          the page
"""
