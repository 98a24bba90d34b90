"""Shapes in body coordinates, drawn in pixels."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from passreid_ray.data.synthetic.people import Colour, Garment
from passreid_ray.data.synthetic.pose import Place, Point


class Brush:
    """Draws onto an RGB canvas and remembers in ``silhouette`` where it did."""

    def __init__(self, canvas: Image.Image, place: Place) -> None:
        self.silhouette = Image.new("L", canvas.size)
        self._canvas = canvas
        self._draw = ImageDraw.Draw(canvas)
        self._draw_silhouette = ImageDraw.Draw(self.silhouette)
        self._place = place

    def polygon(self, outline: Sequence[Point], colour: Colour) -> None:
        points = [self._place(point) for point in outline]
        self._draw.polygon(points, fill=colour)
        self._draw_silhouette.polygon(points, fill=255)

    def ellipse(self, centre: Point, half_width: float, half_height: float, colour: Colour) -> None:
        box = self._box(centre, half_width, half_height)
        self._draw.ellipse(box, fill=colour)
        self._draw_silhouette.ellipse(box, fill=255)

    def dome(self, base: Point, half_width: float, height: float, colour: Colour) -> None:
        """The upper half of an ellipse that stands on ``base``."""
        box = self._box(base, half_width, height)
        self._draw.pieslice(box, 180, 360, fill=colour)
        self._draw_silhouette.pieslice(box, 180, 360, fill=255)

    def block(self, centre: Point, half_width: float, half_height: float, colour: Colour) -> None:
        """A rectangle with round corners."""
        box = self._box(centre, half_width, half_height)
        radius = 0.6 * min(box[2] - box[0], box[3] - box[1]) / 2
        self._draw.rounded_rectangle(box, radius, fill=colour)
        self._draw_silhouette.rounded_rectangle(box, radius, fill=255)

    def limb(self, joints: Sequence[Point], half_widths: Sequence[float], colour: Colour) -> None:
        """A tube along ``joints``."""
        _tube(self._draw, *self._pixels(joints, half_widths), colour)
        _tube(self._draw_silhouette, *self._pixels(joints, half_widths), 255)

    def cloth(self, outline: Sequence[Point], garment: Garment, shade: float = 1.0) -> None:
        """A polygon of textured cloth, ``shade`` times as bright as in full light."""
        if garment.texture == "plain":
            self.polygon(outline, shaded(garment.colour, shade))
            return
        mask = Image.new("L", self._canvas.size)
        ImageDraw.Draw(mask).polygon([self._place(point) for point in outline], fill=255)
        self._weave(mask, garment, shade)

    def sleeve(self, joints: Sequence[Point], half_widths: Sequence[float], garment: Garment, shade: float) -> None:
        """A tube of textured cloth along ``joints``."""
        if garment.texture == "plain":
            self.limb(joints, half_widths, shaded(garment.colour, shade))
            return
        mask = Image.new("L", self._canvas.size)
        _tube(ImageDraw.Draw(mask), *self._pixels(joints, half_widths), 255)
        self._weave(mask, garment, shade)

    def _weave(self, mask: Image.Image, garment: Garment, shade: float) -> None:
        box = mask.getbbox()
        if box is None:
            return
        # The pattern hangs on the body, not on the image: it moves with the person.
        origin = self._place((0.0, garment.top))
        period = garment.period * self._place.height_px
        pattern = _pattern(box, origin, period, garment, shade)
        mask = mask.crop(box)
        self._canvas.paste(pattern, box, mask)
        self.silhouette.paste(255, box, mask)

    def _pixels(self, joints: Sequence[Point], half_widths: Sequence[float]) -> tuple[list[Point], list[float]]:
        return [self._place(joint) for joint in joints], [width * self._place.height_px for width in half_widths]

    def _box(self, centre: Point, half_width: float, half_height: float) -> tuple[float, float, float, float]:
        x, y = centre
        return *self._place((x - half_width, y - half_height)), *self._place((x + half_width, y + half_height))


def shaded(colour: Colour, factor: float) -> Colour:
    """``colour`` made brighter or darker."""
    red, green, blue = colour
    return min(int(red * factor), 255), min(int(green * factor), 255), min(int(blue * factor), 255)


def _tube(draw: ImageDraw.ImageDraw, joints: list[Point], radii: list[float], fill: Colour | int) -> None:
    for (x0, y0), (x1, y1), r0, r1 in zip(joints, joints[1:], radii, radii[1:], strict=False):
        length = max(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5, 1e-6)
        across_x, across_y = (y1 - y0) / length, (x0 - x1) / length
        outline = [
            (x0 + r0 * across_x, y0 + r0 * across_y),
            (x1 + r1 * across_x, y1 + r1 * across_y),
            (x1 - r1 * across_x, y1 - r1 * across_y),
            (x0 - r0 * across_x, y0 - r0 * across_y),
        ]
        draw.polygon(outline, fill=fill)
    for (x, y), r in zip(joints[:-1], radii[:-1], strict=True):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _pattern(
    box: tuple[int, int, int, int], origin: Point, period: float, garment: Garment, shade: float
) -> Image.Image:
    """The garment's texture for the pixels of ``box``, in phase with ``origin``."""
    width, height = box[2] - box[0], box[3] - box[1]
    left, top = origin[0] - box[0], origin[1] - box[1]
    second = shaded(garment.second, shade)
    pattern = Image.new("RGB", (width, height), shaded(garment.colour, shade))
    draw = ImageDraw.Draw(pattern)
    rows = _repeats(top, period, height)
    columns = _repeats(left, period, width)
    match garment.texture:
        case "rows":
            for y in rows:
                draw.rectangle((0, y, width, y + period / 2), fill=second)
        case "columns":
            for x in columns:
                draw.rectangle((x, 0, x + period / 2, height), fill=second)
        case "checks":
            for y in rows:
                draw.rectangle((0, y, width, y + period * 0.3), fill=second)
            for x in columns:
                draw.rectangle((x, 0, x + period * 0.3, height), fill=second)
        case "dots":
            for y in rows:
                for x in columns:
                    draw.ellipse((x, y, x + period / 2, y + period / 2), fill=second)
        case "halves":
            draw.rectangle((0, min(top + 2.5 * period, height), width, height), fill=second)
    return pattern


def _repeats(origin: float, period: float, length: int) -> list[float]:
    start = origin % period - period
    return [start + i * period for i in range(int(length / period) + 3)]
