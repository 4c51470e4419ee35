"""A report about runs: one HTML file that needs no network and no script.

contents      what a page shows, as plain data
markup        HTML elements; all text in them is escaped
style         the style sheet
curves        curves of several runs in one SVG
tables        tables: plain ones, and runs side by side with the differing rows marked
confusion     which classes are confused
embedding     pictures as data URIs of a bounded size
sections      the sections of the page
page          the whole page
"""
