//! The course of the stream as SVG.

use std::error::Error;

use indicatif::HumanCount;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::policy::{Policy, Settings};
use crate::series::{Measures, Series};

const WIDTH: u32 = 1000;
const PANEL_HEIGHT: u32 = 330;
const FONT: &str = "sans-serif";
/// Blue, vermilion and green that can be told apart by the colour-blind too.
const BLUE: RGBColor = RGBColor(0, 114, 178);
const VERMILION: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 120, 90);

fn color(policy: Policy) -> RGBColor {
    match policy {
        Policy::Sinks => BLUE,
        Policy::Window => VERMILION,
        Policy::Full => GREEN,
    }
}

fn name(policy: Policy, settings: &Settings) -> String {
    let Settings { window, sink_tokens, capacity } = settings;
    match policy {
        Policy::Sinks => format!("sinks: {sink_tokens} first and {window} last tokens"),
        Policy::Window => format!("window: {window} last tokens"),
        Policy::Full => format!("full: all, {} at most", HumanCount(*capacity as u64)),
    }
}

/// A curve's value, where there is one.
type Value = fn(&Measures) -> Option<f64>;

/// Panels over the same tokens, which grow from left to right tenfold by tenfold. The same results give the same picture.
pub fn draw(lanes: &[(Policy, &Series)], settings: &Settings) -> Result<String, Box<dyn Error>> {
    // Full attention below the others, which it may lie under.
    let mut lanes = lanes.to_vec();
    lanes.sort_by_key(|(policy, _)| *policy != Policy::Full);
    let panels: [(&str, &str, Value); 3] = [
        ("What the layer puts out", "root mean square", |m| Some(m.size.sqrt())),
        ("Difference from full attention, as long as it has room", "percent", |m| {
            m.relative_difference().map(|difference| 100.0 * difference)
        }),
        ("Share of the probability that the first tokens take", "percent", |m| Some(100.0 * m.first)),
    ];
    // Full attention does not differ from itself.
    let shown = |n: usize, policy: Policy| n != 1 || policy != Policy::Full;
    let there = |n: &usize| {
        let (_, _, value) = panels[*n];
        lanes.iter().any(|(policy, series)| {
            shown(*n, *policy) && series.stretches.iter().any(|stretch| value(&stretch.mean()).is_some())
        })
    };
    let drawn: Vec<usize> = (0..panels.len()).filter(there).collect();
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, PANEL_HEIGHT * drawn.len() as u32)).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, n) in root.margin(10, 10, 10, 50).split_evenly((drawn.len(), 1)).iter().zip(drawn) {
            let (title, unit, value) = panels[n];
            let lanes: Vec<_> = lanes.iter().copied().filter(|(policy, _)| shown(n, *policy)).collect();
            // Where no curve is.
            let legend = if n == 2 { SeriesLabelPosition::MiddleLeft } else { SeriesLabelPosition::UpperLeft };
            panel(area, [title, unit], &lanes, settings, value, legend)?;
        }
        root.present()?;
    }
    Ok(svg)
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    [title, unit]: [&str; 2],
    lanes: &[(Policy, &Series)],
    settings: &Settings,
    value: Value,
    legend: SeriesLabelPosition,
) -> Result<(), Box<dyn Error>> {
    // Steps: a stretch is a mean, and a single one shows, too. The first token is number 1.
    let steps = |series: &Series| {
        let steps = series.stretches.iter().filter_map(|stretch| {
            let y = value(&stretch.mean())?;
            Some([((stretch.start + 1) as f64, y), ((stretch.start + 1 + stretch.tokens) as f64, y)])
        });
        steps.flatten().collect::<Vec<_>>()
    };
    let points = || lanes.iter().flat_map(|(_, series)| steps(series));
    let most = points().map(|(_, y)| y).fold(f64::MIN_POSITIVE, f64::max);
    let end = lanes.iter().flat_map(|(_, series)| series.stretches.last()).map(|last| last.start + 1 + last.tokens);
    let end = end.max().unwrap_or(2) as f64;
    let mut chart = ChartBuilder::on(area)
        .margin_top(12)
        .caption(title, (FONT, 22))
        .x_label_area_size(50)
        .y_label_area_size(95)
        .build_cartesian_2d((1.0..end).log_scale(), 0.0..1.15 * most)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .x_desc("tokens streamed")
        .y_desc(unit)
        .x_label_formatter(&|&x| HumanCount(x as u64).to_string())
        .y_labels(6)
        .y_label_formatter(&|&y| match most {
            ..1.0 => format!("{y:.2}"),
            ..10.0 => format!("{y:.1}"),
            _ => HumanCount(y as u64).to_string(),
        })
        .draw()?;
    for &(policy, series) in lanes {
        let (color, width) = (color(policy), if policy == Policy::Full { 5 } else { 2 });
        chart
            .draw_series(LineSeries::new(steps(series), color.stroke_width(width)))?
            .label(name(policy, settings))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(legend)
        .legend_area_size(34)
        .margin(10)
        .label_font((FONT, 17))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_of_any_length_and_policies() {
        let settings = Settings { window: 16, sink_tokens: 4, capacity: 70 };
        for tokens in [1, 2, 1500] {
            let mut series = Series::default();
            for token in 0..tokens {
                series.push(token, &Measures { size: 2.0, full: 1.0, ..Measures::default() });
            }
            let alone = draw(&[(Policy::Full, &series)], &settings).unwrap();
            assert!(alone.starts_with("<svg") && !alone.contains("Difference"));
            let lanes = Policy::ALL.map(|policy| (policy, &series));
            let all = draw(&lanes, &settings).unwrap();
            assert!(["Difference", "window: 16 last", "full: all, 70 at most"].iter().all(|part| all.contains(part)));
            assert_eq!(draw(&lanes, &settings).unwrap(), all);
        }
    }
}
