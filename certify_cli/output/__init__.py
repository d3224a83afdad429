"""Records as text, in every format.

A format is a pure function from records to text: it computes no figure, opens no file and knows no option, so that all
of them can be tested on made-up records. Text that came from a file passes through `console.printable` or `escaped`
first. Heavy libraries (Rich, matplotlib, jinja2) are loaded where something is drawn.
"""
