//! The course of the stream, kept in bounded memory and drawn as SVG.

use std::error::Error;
use std::ops::Range;

use indicatif::HumanCount;
use plotters::coord::Shift;
use plotters::prelude::*;

const SIZE: (u32, u32) = (1000, 760);
const FONT: &str = "sans-serif";
/// Blue, vermilion and green that can be told apart by the colour-blind too.
const BLUE: RGBColor = RGBColor(0, 114, 178);
const VERMILION: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 120, 90);

/// Shares of the probability, 0 to 1.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shares {
    pub logit: f64,
    pub sink_tokens: f64,
}

/// A stretch of the stream.
#[derive(Debug, Clone, Default)]
pub struct Point {
    pub tokens: Range<usize>,
    pub seconds: f64,
    pub shares: Shares,
}

impl Point {
    /// This stretch and the next as one; shares are means over tokens.
    fn join(&self, next: &Point) -> Point {
        let (a, b) = (self.tokens.len() as f64, next.tokens.len() as f64);
        let mean = |x: f64, y: f64| (x * a + y * b) / (a + b);
        Point {
            tokens: self.tokens.start..next.tokens.end,
            seconds: self.seconds + next.seconds,
            shares: Shares {
                logit: mean(self.shares.logit, next.shares.logit),
                sink_tokens: mean(self.shares.sink_tokens, next.shares.sink_tokens),
            },
        }
    }

    fn rate(&self) -> f64 {
        self.tokens.len() as f64 / self.seconds.max(1e-9)
    }
}

/// At most a thousand points, however long the stream: when there are more, neighbours become one.
#[derive(Debug)]
pub struct Series {
    points: Vec<Point>,
    /// Chunks to a point, and those in the last point.
    chunks: usize,
    chunks_in_last: usize,
}

impl Default for Series {
    fn default() -> Self {
        Series { points: Vec::with_capacity(Self::MOST), chunks: 1, chunks_in_last: 1 }
    }
}

impl Series {
    const MOST: usize = 1000;

    pub fn push(&mut self, chunk: Point) {
        match self.points.last_mut() {
            Some(last) if self.chunks_in_last < self.chunks => {
                *last = last.join(&chunk);
                self.chunks_in_last += 1;
                return;
            }
            _ => {}
        }
        if self.points.len() == Self::MOST {
            for i in 0..Self::MOST / 2 {
                self.points[i] = self.points[2 * i].join(&self.points[2 * i + 1]);
            }
            self.points.truncate(Self::MOST / 2);
            self.chunks *= 2;
        }
        self.points.push(chunk);
        self.chunks_in_last = 1;
    }

    fn total(&self) -> Point {
        self.points.iter().fold(Point::default(), |total, point| total.join(point))
    }

    /// The mean over the whole stream.
    pub fn shares(&self) -> Shares {
        self.total().shares
    }
}

/// One curve of a panel.
struct Curve {
    name: &'static str,
    color: RGBColor,
    value: fn(&Point) -> f64,
}

/// Two panels over the same tokens: the sinks' shares, and the speed.
pub fn draw(series: &Series, device: &str) -> Result<String, Box<dyn Error>> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let (top, bottom) = root.margin(10, 10, 10, 30).split_vertically(SIZE.1 * 55 / 100);
        let shares = [
            Curve { name: "sink logit", color: BLUE, value: |point| 100.0 * point.shares.logit },
            Curve { name: "sink tokens", color: VERMILION, value: |point| 100.0 * point.shares.sink_tokens },
        ];
        let speed = [Curve { name: "tokens/s of each chunk", color: GREEN, value: Point::rate }];
        panel(&top, "Share of the probability that the sinks take", "percent", series, &shares)?;
        panel(&bottom, &format!("Speed on {device}"), "tokens/s", series, &speed)?;
        root.present()?;
    }
    Ok(svg)
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    unit: &str,
    series: &Series,
    curves: &[Curve],
) -> Result<(), Box<dyn Error>> {
    let values = series.points.iter().flat_map(|point| curves.iter().map(|curve| (curve.value)(point)));
    let most = values.fold(f64::MIN_POSITIVE, f64::max);
    let tokens = series.total().tokens.end;
    let mut chart = ChartBuilder::on(area)
        .margin_top(12)
        .caption(title, (FONT, 22))
        .x_label_area_size(50)
        .y_label_area_size(95)
        .build_cartesian_2d(0.0..tokens as f64, 0.0..1.1 * most)?;
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
    for &Curve { name, color, value } in curves {
        // Steps: a point is a mean over its stretch, and a single one shows too.
        let steps = series.points.iter().flat_map(|point| {
            let y = value(point);
            [(point.tokens.start as f64, y), (point.tokens.end as f64, y)]
        });
        chart
            .draw_series(LineSeries::new(steps, color.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
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

    /// Chunks of two tokens, the share of each its number.
    fn series(chunks: usize) -> Series {
        let mut series = Series::default();
        for i in 0..chunks {
            let shares = Shares { logit: i as f64, sink_tokens: 0.0 };
            series.push(Point { tokens: 2 * i..2 * i + 2, seconds: 0.5, shares });
        }
        series
    }

    #[test]
    fn any_length_is_kept_in_bounded_memory() {
        for chunks in [1, 2, 999, 1000, 1001, 1999, 2000, 2001, 123_457] {
            let series = series(chunks);
            assert!(series.points.len() <= Series::MOST);
            assert!(series.points.windows(2).all(|pair| pair[0].tokens.end == pair[1].tokens.start));
            let total = series.total();
            assert_eq!(total.tokens, 0..2 * chunks);
            approx::assert_relative_eq!(total.seconds, 0.5 * chunks as f64, max_relative = 1e-9);
            approx::assert_relative_eq!(total.shares.logit, (chunks - 1) as f64 / 2.0, max_relative = 1e-9);
        }
    }

    #[test]
    fn pictures_of_short_streams() {
        for chunks in [1, 2, 1500] {
            let svg = draw(&series(chunks), "a device & <its> name").unwrap();
            assert!(svg.starts_with("<svg") && svg.contains("a device &amp; &lt;its&gt; name"));
        }
    }
}
