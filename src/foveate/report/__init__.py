"""Reports as HTML files: on a precision map, on importance that follows a stream, and on one input.

Layers and colours are shared with the terminal.
"""

from foveate.report.live import following_page as following_page
from foveate.report.live import input_page as input_page
from foveate.report.page import Measured as Measured
from foveate.report.page import html as html
