//! The course of a stream in bounded memory: stretches that grow with the position.

/// What is measured of a token, or the mean of it over a stretch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Measures {
    /// Mean square of o.
    pub size: f64,
    /// Shares of the probability, 0 to 1: of the first tokens, and of the sink logit.
    pub first: f64,
    pub logit: f64,
    /// Mean square of the difference to full attention, and of full attention's o; 0 where it is not there.
    pub difference: f64,
    pub full: f64,
}

impl Measures {
    pub const COUNT: usize = 5;

    pub fn to_array(self) -> [f64; Self::COUNT] {
        [self.size, self.first, self.logit, self.difference, self.full]
    }

    pub fn from_array([size, first, logit, difference, full]: [f64; Self::COUNT]) -> Self {
        Measures { size, first, logit, difference, full }
    }

    /// How far from full attention, as a share of its size.
    pub fn relative_difference(&self) -> Option<f64> {
        (self.full > 0.0).then(|| (self.difference / self.full).sqrt())
    }
}

/// A stretch of the stream; `measures` are sums.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stretch {
    pub start: usize,
    pub tokens: usize,
    pub measures: Measures,
}

impl Stretch {
    pub fn mean(&self) -> Measures {
        Measures::from_array(self.measures.to_array().map(|sum| sum / self.tokens as f64))
    }
}

/// Some thirty stretches for every tenfold: a million tokens have fewer than two hundred.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Series {
    pub stretches: Vec<Stretch>,
}

impl Series {
    const PER_TENFOLD: f64 = 30.0;

    /// The token before which the stretch ends that begins with `start`.
    fn end(start: usize) -> usize {
        ((start + 1) as f64 * 10f64.powf(1.0 / Self::PER_TENFOLD)) as usize + 1
    }

    /// The tokens must come in their order.
    pub fn push(&mut self, token: usize, measures: &Measures) {
        match self.stretches.last_mut() {
            Some(last) if token < Self::end(last.start) => {
                let (a, b) = (last.measures.to_array(), measures.to_array());
                last.measures = Measures::from_array(std::array::from_fn(|i| a[i] + b[i]));
                last.tokens += 1;
            }
            _ => self.stretches.push(Stretch { start: token, tokens: 1, measures: *measures }),
        }
    }

    /// Whether it is that of the first tokens, so many of them.
    pub fn covers(&self, tokens: usize) -> bool {
        let next = |at: Option<usize>, stretch: &Stretch| {
            at.filter(|at| *at == stretch.start && stretch.tokens > 0)?.checked_add(stretch.tokens)
        };
        self.stretches.iter().fold(Some(0), next) == Some(tokens)
    }

    /// Means over the stretches from a token on, if there are any.
    pub fn after(&self, token: usize) -> Option<Stretch> {
        let mut sum = Stretch { start: token, tokens: 0, measures: Measures::default() };
        for stretch in self.stretches.iter().filter(|stretch| stretch.start >= token) {
            let (a, b) = (sum.measures.to_array(), stretch.measures.to_array());
            sum.measures = Measures::from_array(std::array::from_fn(|i| a[i] + b[i]));
            sum.tokens += stretch.tokens;
        }
        (sum.tokens > 0).then(|| Stretch { measures: sum.mean(), ..sum })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_length_is_kept_in_bounded_memory() {
        let mut series = Series::default();
        for token in 0..1_000_000 {
            series.push(token, &Measures { size: 1.0, full: token as f64, ..Measures::default() });
        }
        assert!((100..200).contains(&series.stretches.len()), "{}", series.stretches.len());
        assert!(series.covers(1_000_000) && !series.covers(999_999));
        let total = series.after(0).unwrap();
        assert_eq!((total.tokens, total.measures.size, total.measures.full), (1_000_000, 1.0, 499_999.5));
        let last = series.stretches.last().unwrap();
        assert!(last.start + last.tokens == 1_000_000 && last.tokens < 100_000);
    }
}
