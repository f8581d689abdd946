//! Charts as SVG, drawn by plotters: bars with whiskers, stacked bars, curves over percentiles or over steps.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::{Comparison, show};

const WIDTH: i32 = 900;
const ROW: i32 = 30;
const MARGIN: i32 = 8;
/// Where bars begin: right of the cases' names.
const LEFT: i32 = 300;
/// Where the longest bar ends: left of its value.
const RIGHT: i32 = WIDTH - 110;
const BAR: RGBColor = RGBColor(88, 129, 87);
const REFERENCE: RGBColor = RGBColor(170, 170, 170);
/// Parts of a stacked bar.
const PARTS: [RGBColor; 4] =
    [RGBColor(88, 129, 87), RGBColor(188, 108, 37), RGBColor(106, 125, 160), RGBColor(150, 150, 150)];
const FONT: (&str, i32) = ("sans-serif", 14);
const SMALL: (&str, i32) = ("sans-serif", 12);
/// The field of curves: left, top, right, bottom; the legend is right of it.
const FIELD: (i32, i32, i32, i32) = (60, 12, 620, 380);
/// Percentiles that have a line.
const GRID: [f64; 6] = [1.0, 50.0, 90.0, 99.0, 99.9, 99.99];

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A median with its extremes.
#[derive(Debug, Clone)]
pub(crate) struct Bar {
    pub(crate) label: String,
    pub(crate) minimum: f64,
    pub(crate) median: f64,
    pub(crate) maximum: f64,
}

/// Values that add up.
#[derive(Debug, Clone)]
pub(crate) struct Stack {
    pub(crate) label: String,
    pub(crate) parts: Vec<f64>,
}

/// Values (above 0) by percentile, or by step.
#[derive(Debug, Clone)]
pub(crate) struct Curve {
    pub(crate) label: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// One horizontal bar for each case: the median, with a whisker from minimum to maximum.
pub(crate) fn bars(comparison: &Comparison) -> Result<String> {
    let bar = |(label, spread): &(String, crate::report::Spread)| Bar {
        label: label.clone(),
        minimum: spread.minimum,
        median: spread.median,
        maximum: spread.maximum,
    };
    let bars: Vec<Bar> = comparison.cases.iter().map(bar).collect();
    whiskers(&bars, |value| show(&comparison.metric, value))
}

/// Horizontal bars with whiskers; `show` makes a value text.
pub(crate) fn whiskers(bars: &[Bar], show: impl Fn(f64) -> String) -> Result<String> {
    whiskers_beside(bars, &[], show)
}

/// The same; those with a label of `references`, which the others are compared with, are grey.
pub(crate) fn whiskers_beside(
    bars: &[Bar],
    references: &[String],
    show: impl Fn(f64) -> String,
) -> Result<String> {
    let longest = bars.iter().map(|bar| bar.maximum).fold(0.0, f64::max);
    let position = scale(longest);
    picture(2 * MARGIN + ROW * bars.len() as i32, |area| {
        for (row, bar) in (0..).zip(bars) {
            let middle = MARGIN + ROW * row + ROW / 2;
            let corners = [(LEFT, middle - ROW / 3), (position(bar.median), middle + ROW / 3)];
            let color = if references.contains(&bar.label) { REFERENCE } else { BAR };
            area.draw(&Rectangle::new(corners, color.filled()))?;
            let whisker = [(position(bar.minimum), middle), (position(bar.maximum), middle)];
            area.draw(&PathElement::new(whisker, BLACK))?;
            for end in [bar.minimum, bar.maximum].map(&position) {
                area.draw(&PathElement::new([(end, middle - 4), (end, middle + 4)], BLACK))?;
            }
            text(area, &bar.label, (LEFT - MARGIN, middle), HPos::Right, FONT)?;
            text(area, &show(bar.median), (position(bar.maximum) + MARGIN, middle), HPos::Left, FONT)?;
        }
        Ok(())
    })
}

/// Horizontal bars of up to four parts, with a legend.
pub(crate) fn stacks(stacks: &[Stack], parts: &[&str]) -> Result<String> {
    let longest = stacks.iter().map(|stack| stack.parts.iter().sum()).fold(0.0, f64::max);
    let position = scale(longest);
    picture(2 * MARGIN + ROW * (stacks.len() as i32 + 1), |area| {
        let mut x = LEFT;
        for (part, color) in parts.iter().zip(PARTS) {
            let middle = MARGIN + ROW / 2;
            area.draw(&Rectangle::new([(x, middle - 6), (x + 12, middle + 6)], color.filled()))?;
            text(area, part, (x + 18, middle), HPos::Left, SMALL)?;
            x += 30 + 7 * part.len() as i32;
        }
        for (row, stack) in (1..).zip(stacks) {
            let middle = MARGIN + ROW * row + ROW / 2;
            let mut sum = 0.0;
            for (part, color) in stack.parts.iter().zip(PARTS) {
                let from = position(sum);
                sum += part;
                let corners = [(from, middle - ROW / 3), (position(sum), middle + ROW / 3)];
                area.draw(&Rectangle::new(corners, color.filled()))?;
            }
            text(area, &stack.label, (LEFT - MARGIN, middle), HPos::Right, FONT)?;
            text(area, &format!("{sum:.2}"), (position(sum) + MARGIN, middle), HPos::Left, FONT)?;
        }
        Ok(())
    })
}

/// Values over percentiles, both on scales that show the tail: each nine to the right, each power of ten upwards.
pub(crate) fn curves(curves: &[Curve]) -> Result<String> {
    let nines = |percentile: f64| -(1.0 - percentile / 100.0).log10();
    let (first, last) = (nines(GRID[0]), nines(GRID[GRID.len() - 1]));
    let ticks: Vec<(f64, String)> =
        GRID.iter().map(|percentile| (*percentile, percentile.to_string())).collect();
    field(curves, &ticks, |percentile| (nines(percentile) - first) / (last - first))
}

/// Values over `steps` at equal distances, a power of ten upwards each; points are given by the number of their step.
pub(crate) fn lines(curves: &[Curve], steps: &[String]) -> Result<String> {
    let ticks: Vec<(f64, String)> = (0..).map(f64::from).zip(steps.iter().cloned()).collect();
    let last = steps.len().saturating_sub(1).max(1) as f64;
    field(curves, &ticks, |step| step / last)
}

/// Curves, a legend beside them; `place` says where a value is from the left (0) to the right (1).
fn field(curves: &[Curve], ticks: &[(f64, String)], place: impl Fn(f64) -> f64) -> Result<String> {
    let (left, top, right, bottom) = FIELD;
    let values = || curves.iter().flat_map(|curve| curve.points.iter().map(|point| point.1.max(1e-3)));
    let low = values().fold(f64::INFINITY, f64::min).log10().floor();
    let high = values().fold(0.0, f64::max).log10().ceil().max(low + 1.0);
    if !low.is_finite() {
        return Ok(String::new());
    }
    let x = |value: f64| left + (place(value) * f64::from(right - left)) as i32;
    let y = |value: f64| {
        bottom - ((value.max(1e-3).log10() - low) / (high - low) * f64::from(bottom - top)) as i32
    };
    let legend = top + 20 * curves.len() as i32;
    picture(legend.max(bottom + 30), |area| {
        let grid = RGBColor(220, 220, 220);
        for (value, label) in ticks {
            area.draw(&PathElement::new([(x(*value), top), (x(*value), bottom)], grid))?;
            text(area, label, (x(*value), bottom + 14), HPos::Center, SMALL)?;
        }
        for power in low as i32..=high as i32 {
            let value = 10_f64.powi(power);
            area.draw(&PathElement::new([(left, y(value)), (right, y(value))], grid))?;
            text(area, &value.to_string(), (left - 6, y(value)), HPos::Right, SMALL)?;
        }
        for (index, curve) in curves.iter().enumerate() {
            let color = Palette99::pick(index).to_rgba();
            let points: Vec<_> = curve.points.iter().map(|(at, value)| (x(*at), y(*value))).collect();
            area.draw(&PathElement::new(points, color.stroke_width(2)))?;
            let middle = top + 20 * index as i32 + 8;
            let sample = [(right + 12, middle), (right + 32, middle)];
            area.draw(&PathElement::new(sample, color.stroke_width(3)))?;
            text(area, &curve.label, (right + 38, middle), HPos::Left, SMALL)?;
        }
        Ok(())
    })
}

/// From values to places on a bar.
fn scale(longest: f64) -> impl Fn(f64) -> i32 {
    let scale = if longest > 0.0 { f64::from(RIGHT - LEFT) / longest } else { 0.0 };
    move |value| LEFT + (value * scale).round() as i32
}

fn text(area: &Area<'_>, text: &str, place: (i32, i32), side: HPos, font: (&str, i32)) -> Drawn {
    let style = font.into_text_style(area).pos(Pos::new(side, VPos::Center));
    Ok(area.draw(&Text::new(text.to_string(), place, style))?)
}

fn picture(height: i32, draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String> {
    let mut svg = String::new();
    let drawn = {
        let area = SVGBackend::with_string(&mut svg, (WIDTH as u32, height as u32)).into_drawing_area();
        draw(&area).and_then(|()| Ok(area.present()?))
    };
    drawn.map_err(|error| anyhow!("drawing a chart: {error}"))?;
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_hold_what_they_are_given() {
        let bar = Bar { label: "a".into(), minimum: 1.0, median: 2.0, maximum: 4.0 };
        let svg = whiskers(&[bar], |value| format!("{value} reads")).unwrap();
        assert!(svg.contains("2 reads") && svg.ends_with("</svg>\n"), "{svg}");
        let curve = Curve { label: "tail".into(), points: vec![(1.0, 5.0), (99.99, 5000.0)] };
        assert!(curves(&[curve]).unwrap().contains("tail") && curves(&[]).unwrap().is_empty());
        let line = Curve { label: "line".into(), points: vec![(0.0, 5.0), (1.0, 50.0)] };
        let svg = lines(&[line], &["64K".into(), "1M".into()]).unwrap();
        assert!(svg.contains("64K") && svg.contains("line"), "{svg}");
        let stack = Stack { label: "s".into(), parts: vec![0.5, 0.75] };
        assert!(stacks(&[stack], &["x", "y"]).unwrap().contains("1.25"));
    }
}
