//! Means, standard deviations, and whether two means differ: Welch's t-test at 95 %, two-sided, which does not take both
//! to have the same variance.

/// Values of one metric of one case.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    pub(super) count: usize,
    pub(super) mean: f64,
    /// Of the population that the values are taken from (divided by their number less one); 0 of one value.
    pub(super) deviation: f64,
}

impl Sample {
    /// `None` of no values.
    pub(super) fn of(values: &[f64]) -> Option<Sample> {
        let count = values.len();
        let mean = values.iter().sum::<f64>() / count as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = if count > 1 { (squares / (count - 1) as f64).sqrt() } else { 0.0 };
        (count > 0).then_some(Sample { count, mean, deviation })
    }

    /// The variance of the mean.
    fn error(&self) -> f64 {
        self.deviation.powi(2) / self.count as f64
    }
}

/// Whether the means of two samples differ with a confidence of 95 %; `None` where one of them has but one value.
pub(super) fn differ(one: &Sample, other: &Sample) -> Option<bool> {
    if one.count < 2 || other.count < 2 {
        return None;
    }
    let error = one.error() + other.error();
    let distance = (one.mean - other.mean).abs();
    if error == 0.0 {
        return Some(distance > 0.0);
    }
    // Welch and Satterthwaite.
    let part = |sample: &Sample| sample.error().powi(2) / (sample.count - 1) as f64;
    let freedom = error.powi(2) / (part(one) + part(other));
    Some(distance / error.sqrt() > critical(freedom))
}

/// The ends of the 95 % confidence interval of the difference of means, as parts of the other's mean: what the true
/// difference may well be. `None` where [`differ`] has none, or that mean is 0.
pub(super) fn interval(one: &Sample, other: &Sample) -> Option<(f64, f64)> {
    if one.count < 2 || other.count < 2 || other.mean == 0.0 {
        return None;
    }
    let error = one.error() + other.error();
    let part = |sample: &Sample| sample.error().powi(2) / (sample.count - 1) as f64;
    let freedom = if error > 0.0 { error.powi(2) / (part(one) + part(other)) } else { f64::INFINITY };
    let (distance, reach) = (one.mean - other.mean, critical(freedom) * error.sqrt());
    Some(((distance - reach) / other.mean.abs(), (distance + reach) / other.mean.abs()))
}

/// Degrees of freedom, and the 97.5th percentile of Student's t distribution.
const CRITICAL: [(f64, f64); 18] = [
    (1.0, 12.706),
    (2.0, 4.303),
    (3.0, 3.182),
    (4.0, 2.776),
    (5.0, 2.571),
    (6.0, 2.447),
    (7.0, 2.365),
    (8.0, 2.306),
    (9.0, 2.262),
    (10.0, 2.228),
    (12.0, 2.179),
    (15.0, 2.131),
    (20.0, 2.086),
    (30.0, 2.042),
    (40.0, 2.021),
    (60.0, 2.000),
    (120.0, 1.980),
    (f64::INFINITY, 1.960),
];

/// Between the table's rows by the reciprocal of the degrees of freedom, in which t is nearly straight.
fn critical(freedom: f64) -> f64 {
    let above = CRITICAL.iter().position(|(of, _)| *of >= freedom).unwrap_or(CRITICAL.len() - 1);
    let (high, value) = CRITICAL[above];
    let Some((low, before)) = above.checked_sub(1).map(|below| CRITICAL[below]) else { return value };
    let (low, high, at) = (1.0 / low, 1.0 / high, 1.0 / freedom);
    value + (before - value) * (at - high) / (low - high)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(values: &[f64]) -> Sample {
        Sample::of(values).unwrap()
    }

    #[test]
    fn samples_have_means_and_deviations() {
        let found = sample(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]);
        assert_eq!((found.count, found.mean), (8, 5.0));
        assert!((found.deviation - 2.138_089_935).abs() < 1e-9, "{found:?}");
        assert_eq!(sample(&[3.0]).deviation, 0.0);
        assert_eq!(Sample::of(&[]), None);
    }

    #[test]
    fn critical_values_are_those_of_the_tables() {
        // Of degrees of freedom that the table here has not.
        for (freedom, expected) in
            [(1.0, 12.706), (4.0, 2.776), (11.0, 2.201), (25.0, 2.060), (1000.0, 1.962)]
        {
            assert!((critical(freedom) - expected).abs() < 0.003, "{freedom}: {}", critical(freedom));
        }
        assert_eq!(critical(f64::INFINITY), 1.960);
        assert_eq!(critical(0.5), 12.706);
    }

    /// Fifteen values of two machines, t = -2.85 with 27.9 degrees of freedom, and five of others around the limit.
    #[test]
    fn means_differ_or_not_as_welch_has_it() {
        let one = sample(&[
            27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4,
        ]);
        let other = sample(&[
            27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 30.5, 24.4,
        ]);
        assert_eq!(differ(&one, &other), Some(true));
        // t = 2.09 with 8 degrees of freedom: above what it takes with many, below what it takes with so few.
        let (few, fewer) = (sample(&[1.0, 2.0, 3.0, 4.0, 5.0]), sample(&[3.09, 4.09, 5.09, 6.09, 7.09]));
        assert_eq!(differ(&few, &fewer), Some(false));
        assert_eq!(differ(&few, &sample(&[3.4, 4.4, 5.4, 6.4, 7.4])), Some(true));
        assert_eq!(differ(&few, &sample(&[1.0])), None);
        assert_eq!(differ(&sample(&[1.0, 1.0]), &sample(&[1.0, 1.0])), Some(false));
        assert_eq!(differ(&sample(&[1.0, 1.0]), &sample(&[2.0, 2.0])), Some(true));
    }

    #[test]
    fn the_interval_has_zero_in_it_where_means_do_not_differ() {
        let base = sample(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        for (shift, inside) in [(2.09, true), (2.4, false), (-2.4, false)] {
            let values: Vec<f64> = (1..=5).map(|value| f64::from(value) + shift).collect();
            let (low, high) = interval(&sample(&values), &base).unwrap();
            assert_eq!(low <= 0.0 && high >= 0.0, inside, "{low} {high}");
            assert!((f64::midpoint(low, high) - shift / 3.0).abs() < 1e-9);
        }
        assert_eq!(interval(&base, &sample(&[0.0, 0.0])), None);
    }
}
