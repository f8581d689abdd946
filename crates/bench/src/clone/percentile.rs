//! Percentiles of sorted times.

use std::time::Duration;

/// The smallest of the sorted `times` that at least `rank` per cent of them do not exceed; zero of none.
pub(crate) fn percentile(times: &[Duration], rank: f64) -> Duration {
    let index = (times.len() as f64 * rank / 100.0).ceil() as usize;
    times.get(index.clamp(1, times.len().max(1)) - 1).copied().unwrap_or_default()
}

/// The middle of the sorted `times`.
pub(crate) fn median(times: &[Duration]) -> Duration {
    percentile(times, 50.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let times: Vec<_> = (1..=200).map(Duration::from_micros).collect();
        for (rank, expected) in [(0.0, 1), (50.0, 100), (99.0, 198), (99.9, 200), (100.0, 200)] {
            assert_eq!(percentile(&times, rank), Duration::from_micros(expected), "{rank}");
        }
        assert_eq!(percentile(&times[..1], 50.0), Duration::from_micros(1));
        assert_eq!(percentile(&[], 50.0), Duration::ZERO);
    }
}
