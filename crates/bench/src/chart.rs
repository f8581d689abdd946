//! Bars as SVG, drawn by plotters.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::{Comparison, show};

const WIDTH: i32 = 900;
const ROW: i32 = 30;
const MARGIN: i32 = 8;
/// Where bars begin: right of the cases' names.
const LEFT: i32 = 260;
/// Where the longest bar ends: left of its value.
const RIGHT: i32 = WIDTH - 110;
const BAR: RGBColor = RGBColor(88, 129, 87);
const FONT: (&str, i32) = ("sans-serif", 14);

/// One horizontal bar for each case: the median, with a whisker from minimum to maximum.
pub(crate) fn bars(comparison: &Comparison) -> Result<String> {
    let mut svg = String::new();
    draw(comparison, &mut svg).map_err(|error| anyhow!("drawing {}: {error}", comparison.metric))?;
    Ok(svg)
}

fn draw(comparison: &Comparison, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let height = 2 * MARGIN + ROW * i32::try_from(comparison.cases.len())?;
    let area = SVGBackend::with_string(svg, (WIDTH as u32, height as u32)).into_drawing_area();
    let longest = comparison.cases.iter().map(|(_, spread)| spread.maximum).fold(0.0, f64::max);
    let scale = if longest > 0.0 { f64::from(RIGHT - LEFT) / longest } else { 0.0 };
    let position = |value: f64| LEFT + (value * scale).round() as i32;
    let text = |horizontal| FONT.into_text_style(&area).pos(Pos::new(horizontal, VPos::Center));
    for (row, (case, spread)) in (0..).zip(&comparison.cases) {
        let middle = MARGIN + ROW * row + ROW / 2;
        let corners = [(LEFT, middle - ROW / 3), (position(spread.median), middle + ROW / 3)];
        area.draw(&Rectangle::new(corners, BAR.filled()))?;
        let whisker = [(position(spread.minimum), middle), (position(spread.maximum), middle)];
        area.draw(&PathElement::new(whisker, BLACK))?;
        area.draw(&Text::new(case.clone(), (LEFT - MARGIN, middle), text(HPos::Right)))?;
        let value = show(&comparison.metric, spread.median);
        area.draw(&Text::new(value, (position(spread.maximum) + MARGIN, middle), text(HPos::Left)))?;
    }
    area.present()?;
    Ok(())
}
