//! The figures as bars, drawn as SVG.

use std::error::Error;

use plotters::prelude::*;

use super::report::Report;

const WIDTH: i32 = 1000;
/// Height of a row of the picture.
const HEIGHT: i32 = 26;
/// Room on the left of the bars.
const LABELS: i32 = 260;
/// Room on the right of the longest bar.
const FIGURES: i32 = 190;
const FONT: &str = "sans-serif";
/// Okabe and Ito's colours, which the colour-blind can distinguish, too.
const COLORS: [RGBColor; 2] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0)];

/// A bar of TFLOP/s for each row.
pub fn draw(report: &Report) -> Result<String, Box<dyn Error>> {
    let rows: Vec<_> = report.rows.iter().filter_map(|row| Some((row, row.figures.as_ref()?))).collect();
    let most = rows.iter().map(|(_, figures)| figures.tflops).fold(f64::MIN_POSITIVE, f64::max);
    let size = (WIDTH as u32, (60 + HEIGHT * rows.len() as i32) as u32);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        root.draw(&Text::new(format!("TFLOP/s on {}", report.device), (10, 14), (FONT, 20)))?;
        for (index, (row, figures)) in (0..).zip(&rows) {
            let y = 50 + HEIGHT * index;
            let color = COLORS[usize::from(row.pass == "backward")];
            let end = LABELS + (f64::from(WIDTH - LABELS - FIGURES) * figures.tflops / most) as i32;
            root.draw(&Text::new(format!("{} {} {}", row.name, row.dtype, row.pass), (10, y), (FONT, 17)))?;
            root.draw(&Rectangle::new([(LABELS, y), (end.max(LABELS + 1), y + HEIGHT - 8)], color.filled()))?;
            root.draw(&Text::new(figures.to_string(), (end + 8, y), (FONT, 17)))?;
        }
        root.present()?;
    }
    Ok(svg)
}
