//! The course of the fit, drawn as SVG.

use std::error::Error;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::fit::Step;

const SIZE: (u32, u32) = (1000, 800);
const LEGEND_WIDTH: u32 = 120;
const FONT: &str = "sans-serif";
/// Okabe and Ito's colours, which can be told apart by the colour-blind too.
const COLORS: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115), RGBColor(204, 121, 167)];
/// More could not be told apart.
const MOST_POINTS: usize = 1000;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Two panels over the same steps: the loss, and the sink logits on their way to the true ones.
pub fn draw(course: &[Step], true_sinks: &[f32]) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let (top, bottom) = root.margin(10, 10, 10, LEGEND_WIDTH).split_vertically(SIZE.1 * 45 / 100);
        loss(&top, course)?;
        sink_logits(&bottom, course, true_sinks)?;
        // Beside the curves, which leave no corner free.
        for (h, &color) in (0..true_sinks.len()).zip(COLORS.iter().cycle()) {
            let (x, y) = (SIZE.0 as i32 - 100, SIZE.1 as i32 / 2 + 60 + 26 * h as i32);
            root.draw(&PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3)))?;
            root.draw(&Text::new(format!("head {h}"), (x + 32, y - 8), (FONT, 17)))?;
        }
        root.present()?;
    }
    Ok(svg)
}

/// Steps to draw, with their numbers.
fn points(course: &[Step]) -> impl Iterator<Item = (f64, &Step)> {
    let every = course.len().div_ceil(MOST_POINTS);
    course.iter().enumerate().step_by(every).map(|(i, step)| (i as f64, step))
}

fn loss(area: &Area<'_>, course: &[Step]) -> Result<(), Box<dyn Error>> {
    // Neither zero nor NaN has a place on a logarithmic axis.
    let logs = || points(course).filter(|(_, step)| step.loss > 0.0).map(|(i, step)| (i, step.loss.log10()));
    let least = logs().map(|(_, log)| log.floor()).fold(0.0, f64::min);
    let most = logs().map(|(_, log)| log.ceil()).fold(least + 1.0, f64::max);
    let mut chart =
        chart(area, "Loss", "squared distance", course.len(), least..most, |y| format!("{:.0e}", 10f64.powf(*y)))?;
    chart.draw_series(LineSeries::new(logs(), COLORS[0].stroke_width(2)))?;
    Ok(())
}

fn sink_logits(area: &Area<'_>, course: &[Step], true_sinks: &[f32]) -> Result<(), Box<dyn Error>> {
    let all = || points(course).flat_map(|(_, step)| &step.sink_logits).chain(true_sinks).map(|&sink| f64::from(sink));
    let (least, most) = (all().fold(0.0, f64::min) - 0.2, all().fold(0.0, f64::max) + 0.2);
    let title = "Sink logits, the student's (lines) and the teacher's (dashed)";
    let mut chart = chart(area, title, "sink logit", course.len(), least..most, |y| format!("{y:.1}"))?;
    for (h, (&true_sink, color)) in true_sinks.iter().zip(COLORS.iter().cycle()).enumerate() {
        let style = color.stroke_width(2);
        let ends = [0.0, course.len() as f64].map(|x| (x, f64::from(true_sink)));
        chart.draw_series(DashedLineSeries::new(ends, 6, 5, style))?;
        chart
            .draw_series(LineSeries::new(points(course).map(|(i, step)| (i, f64::from(step.sink_logits[h]))), style))?;
    }
    Ok(())
}

/// An empty panel.
fn chart<'a, 'b>(
    area: &'a Area<'b>,
    title: &str,
    unit: &str,
    steps: usize,
    y: Range<f64>,
    y_label: fn(&f64) -> String,
) -> Result<Chart<'a, 'b>, Box<dyn Error>> {
    let mut chart = ChartBuilder::on(area)
        .margin_top(12)
        .caption(title, (FONT, 22))
        .x_label_area_size(50)
        .y_label_area_size(95)
        // No fewer than there are labels, which are whole numbers.
        .build_cartesian_2d(0.0..steps.max(10) as f64, y)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .x_desc("step")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_desc(unit)
        .y_labels(8)
        .y_label_formatter(&y_label)
        .draw()?;
    Ok(chart)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_of_short_and_failed_fits() {
        for (steps, loss) in [(1, 0.0), (2, 1.0), (5000, 1e-9), (3, f64::NAN)] {
            let course: Vec<Step> = (0..steps).map(|_| Step { loss, sink_logits: vec![0.0; 2] }).collect();
            assert!(draw(&course, &[1.0, -1.0]).unwrap().starts_with("<svg"));
        }
    }
}
