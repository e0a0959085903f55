"""What is true of every picture of the house, asked of the figure that was drawn."""

from matplotlib.text import Text

from hf_ibnorm.report import plots


def check_style(figure):
    """One width, two sizes of text, no markup, and nothing that the edge of the picture cuts off."""
    assert figure.get_size_inches()[0] == plots.WIDTH
    edge = figure.bbox.padded(1)
    for text in texts(figure):
        assert text.get_fontsize() in (plots.TEXT, plots.SMALL), text
        assert not {"$", "\\"} & set(text.get_text()), text
        box = text.get_window_extent()
        assert edge.x0 <= box.x0 <= box.x1 <= edge.x1, text
        assert edge.y0 <= box.y0 <= box.y1 <= edge.y1, text


def texts(figure):
    """Every text that is seen."""
    hidden = {
        id(label)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for label in axis.get_ticklabels(which="both")
        if not _inside(axis, label)
    }
    found = figure.findobj(lambda each: isinstance(each, Text) and each.get_visible() and each.get_text())
    return [text for text in found if id(text) not in hidden]


def tick_labels(axis):
    """The labels of an axis as they were drawn, of major and minor ticks."""
    return [label.get_text() for label in axis.get_ticklabels(which="both") if _inside(axis, label)]


def _inside(axis, label):
    place = label.get_position()[0 if axis.axis_name == "x" else 1]
    low, high = sorted(axis.get_view_interval())
    return low <= place <= high and bool(label.get_text())
