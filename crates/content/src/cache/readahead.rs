//! When to fetch more than was asked for: a window for each of several sequential streams of one content. Pure: it is told
//! of misses and says which chunks to have on the way.

use std::ops::Range;

/// How much to fetch beyond what is asked for. Chunks are served one by one as they arrive, so what is fetched beyond costs
/// bandwidth, but the reader no time. The defaults are for a link of 20 ms and 100 Mbit/s, where 256 KiB cost as much as a
/// round trip; the kernel's own read-ahead (128 KiB for btrfs files, and more) has been added before a read comes here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadAhead {
    /// A miss fetches at least this many bytes from the missing chunk on, whoever reads.
    pub demand_bytes: u64,
    /// What the second sequential miss fetches ahead; doubled with each further one.
    pub first_window_bytes: u64,
    /// The widest window; 0 for no read-ahead.
    pub window_bytes_max: u64,
    /// Sequential readers of one content that are followed at once.
    pub streams: usize,
}

impl Default for ReadAhead {
    fn default() -> ReadAhead {
        ReadAhead {
            demand_bytes: 128 << 10,
            first_window_bytes: 256 << 10,
            window_bytes_max: 1 << 20,
            streams: 16,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// The chunk behind the last one that was asked for.
    next: u64,
    /// The chunk behind the last one that is on the way.
    ahead: u64,
    /// Chunks.
    window: u64,
    used: u64,
}

/// The streams of one content.
#[derive(Debug)]
pub(crate) struct Streams {
    policy: ReadAhead,
    chunk_bytes: u64,
    streams: Vec<Stream>,
    clock: u64,
}

impl Streams {
    pub(crate) fn new(policy: ReadAhead, chunk_bytes: u64) -> Streams {
        Streams { policy, chunk_bytes, streams: Vec::new(), clock: 0 }
    }

    /// Chunks `first..=last` were asked for and are not there yet (or only just on the way). Gives the chunks behind them
    /// that should be on the way too.
    pub(crate) fn asked(&mut self, first: u64, last: u64) -> Range<u64> {
        self.clock += 1;
        let chunks = |bytes: u64| bytes / self.chunk_bytes;
        let window_max = chunks(self.policy.window_bytes_max);
        let window_first = chunks(self.policy.first_window_bytes).max(1).min(window_max);
        let widened = (last + 1).max(first + chunks(self.policy.demand_bytes));
        // A reader may come back to the chunk that it read last, or leap forward inside what is on the way.
        let near = |stream: &&mut Stream| first + 1 >= stream.next && first <= stream.ahead;
        if let Some(stream) = self.streams.iter_mut().find(near) {
            stream.used = self.clock;
            if last < stream.next {
                return last + 1..last + 1;
            }
            stream.window = match stream.window {
                0 => window_first,
                // A leap into what is on the way says that not all of it was wanted.
                window if first > stream.next && first < stream.ahead => window,
                window => (window * 2).min(window_max),
            };
            stream.next = last + 1;
            let from = stream.ahead.max(stream.next);
            stream.ahead = from.max(widened).max(stream.next + stream.window);
            return from..stream.ahead;
        }
        let stream = Stream { next: last + 1, ahead: widened, window: 0, used: self.clock };
        if self.streams.len() < self.policy.streams {
            self.streams.push(stream);
        } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
            *oldest = stream;
        }
        last + 1..widened
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams() -> Streams {
        let policy = ReadAhead {
            demand_bytes: 1 << 16,
            first_window_bytes: 2 << 16,
            window_bytes_max: 8 << 16,
            streams: 8,
        };
        Streams::new(policy, 1 << 16)
    }

    #[test]
    fn a_sequential_reader_gets_doubling_windows_up_to_the_bound() {
        let mut streams = streams();
        assert!(streams.asked(10, 10).is_empty());
        assert_eq!(streams.asked(11, 11), 12..14);
        // The reader comes to the end of what was fetched ahead: the next miss.
        assert_eq!(streams.asked(14, 14), 15..19);
        assert_eq!(streams.asked(17, 17), 19..22, "a leap inside the window does not widen it");
        assert_eq!(streams.asked(18, 18), 22..27);
        assert_eq!(streams.asked(19, 19), 27..28, "eight chunks ahead and no more");
    }

    #[test]
    fn random_readers_get_nothing() {
        let mut streams = streams();
        let mut at = 1u64;
        for _ in 0..1000 {
            at = at.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            assert!(streams.asked(at >> 20, at >> 20).is_empty());
        }
        assert_eq!(streams.streams.len(), 8);
    }

    #[test]
    fn interleaved_streams_are_told_apart() {
        let mut streams = streams();
        for step in 0..4 {
            for reader in 0..4 {
                let at = reader * 1000 + step;
                assert_eq!(streams.asked(at, at).is_empty(), step == 0, "reader {reader}, step {step}");
            }
        }
    }

    #[test]
    fn no_window_no_read_ahead() {
        let policy = ReadAhead { window_bytes_max: 0, demand_bytes: 0, ..ReadAhead::default() };
        let mut streams = Streams::new(policy, 1 << 16);
        assert!((0..10).all(|at| streams.asked(at, at).is_empty()));
    }

    #[test]
    fn a_lone_miss_is_widened_and_its_reader_is_known_again() {
        let policy = ReadAhead { demand_bytes: 4 << 16, first_window_bytes: 2 << 16, ..ReadAhead::default() };
        let mut streams = Streams::new(policy, 1 << 16);
        assert_eq!(streams.asked(10, 11), 12..14);
        assert!(streams.asked(100, 110).is_empty());
        assert_eq!(streams.asked(14, 14), 15..18);
        assert_eq!(streams.asked(18, 18), 19..23);
    }
}
