//! [`Proofs`]: which blocks were found right in the file since the cache was opened, and were not dropped since. What the
//! kernel moves without our seeing it is such blocks alone.
//!
//! A word stands for 32 blocks: a bit for each that is *proven*, and above them a *generation* that grows whenever chunks
//! among the 32 are dropped. Whoever lets go of a chunk:
//!
//! ```text
//! D1  clears the chunk's PRESENT bit
//! D2  revoke: in one step, bits away and generation up; then a fence
//! D3  punches the hole
//! ```
//!
//! (a chunk is stored again only after D3: its flight, or the lock on all of them, is held throughout). Three arguments
//! rest on this. `G` is the generation that somebody saw first.
//!
//! *A bit is set for the bytes that were checked.* Who checks sees `G`, then PRESENT, then reads and checks, then sets the
//! bit by a compare-and-swap that fails unless the generation is still `G`. It follows a D2 or comes before it. If it comes
//! before, that D2 takes the bit away. So no bit ever speaks of bytes that were stored after its check.
//!
//! *A proven block is present.* When the bit was set, `G` stood, so no D2 came between seeing PRESENT and setting it; and
//! the next D2 takes the bit away, before D3.
//!
//! *What the kernel read between two looks that both found `G` and the bit is what was checked.* If the kernel read any
//! byte as D3 left it, then it came upon D3's work in the page cache, under the locks of the file; D2 came before D3 (the
//! fence in [`Proofs::revoke`]) and the second look comes after the read (the fence in [`Proofs::still_proven`]), so the
//! second look finds a generation above `G`. The same goes for anything that is stored there after D3. This is a sequence
//! lock whose data is a file.
//!
//! Generations have 32 bits: to be fooled, one read would have to last while chunks in its 128 KiB are dropped, fetched and
//! proven 4 billion times.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::paged::Paged;

/// Blocks of one word.
const WORD_BLOCKS: u64 = 32;
/// Words of one page: 32 MiB of content.
const PAGE: usize = 256;
/// Words of the longest run that is proven in one go: 4 MiB that begin anywhere.
const RUN_WORDS_MAX: usize = 33;
const ONE_GENERATION: u64 = 1 << 32;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Proofs {
    words: Paged<AtomicU64, PAGE>,
}

/// The generations of a run of blocks as somebody saw them: their sum, which is the same only while each is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Generation(pub(crate) u64);

impl Proofs {
    pub(crate) fn new(blocks: u64) -> Proofs {
        Proofs { words: Paged::new(blocks.div_ceil(WORD_BLOCKS)) }
    }

    /// The generation of `blocks`, to be seen before PRESENT is.
    pub(crate) fn generation(&self, blocks: &Range<u64>) -> Generation {
        let words = words_of(blocks);
        // Acquire: a PRESENT bit that is seen afterwards is as it was when this generation came, or newer.
        Generation(words.map(|word| self.load(word) >> 32).fold(0, u64::wrapping_add))
    }

    /// The generation of `blocks` if all of them are proven.
    pub(crate) fn proven(&self, blocks: &Range<u64>) -> Option<Generation> {
        let mut sum = 0u64;
        for word in words_of(blocks) {
            let (value, bits) = (self.load(word), bits_of(word, blocks));
            if value & bits != bits {
                return None;
            }
            sum = sum.wrapping_add(value >> 32);
        }
        Some(Generation(sum))
    }

    /// Whether `blocks` are proven and have been since `seen`, now that the kernel has read them.
    pub(crate) fn still_proven(&self, blocks: &Range<u64>, seen: Generation) -> bool {
        fence(Ordering::Acquire);
        self.proven(blocks) == Some(seen)
    }

    /// Says that `blocks` (at most 4 MiB, else it goes unheard), of which every one was present, read and found right
    /// after `seen` was seen, are proven. Whatever was dropped since is not.
    pub(crate) fn prove(&self, blocks: &Range<u64>, seen: Generation) {
        if self.proven(blocks).is_some() {
            return;
        }
        let words = words_of(blocks);
        let mut values = [0; RUN_WORDS_MAX];
        let Some(values) = values.get_mut(..(words.end - words.start) as usize) else { return };
        let mut sum = 0u64;
        for (word, value) in words.clone().zip(values.iter_mut()) {
            *value = self.load(word);
            sum = sum.wrapping_add(*value >> 32);
        }
        if Generation(sum) != seen {
            return;
        }
        for (word, value) in words.zip(values.iter()) {
            let page = self.words.set(Paged::<AtomicU64, PAGE>::page_of(word), empty_page);
            add_bits(&page[(word % PAGE as u64) as usize], *value, bits_of(word, blocks));
        }
    }

    /// Takes back what was said of `blocks`: they are about to change. For every word of them, so that the generation of
    /// any run with one of these blocks grows.
    pub(crate) fn revoke(&self, blocks: &Range<u64>) {
        for word in words_of(blocks) {
            let page = self.words.set(Paged::<AtomicU64, PAGE>::page_of(word), empty_page);
            let next = |value: u64| Some((value & !bits_of(word, blocks)).wrapping_add(ONE_GENERATION));
            let _ =
                page[(word % PAGE as u64) as usize].fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        }
        // Nothing that follows (the hole) is seen by anyone who does not see this.
        fence(Ordering::SeqCst);
    }

    fn load(&self, word: u64) -> u64 {
        self.words.get(word).map_or(0, |word| word.load(Ordering::Acquire))
    }
}

/// Adds bits to a word that was seen as `value`, unless it is of another generation by now.
fn add_bits(word: &AtomicU64, mut value: u64, bits: u64) {
    // Other readers may add other bits meanwhile. Release: who sees the bits sees the chunk's bytes.
    while let Err(now) = word.compare_exchange_weak(value, value | bits, Ordering::AcqRel, Ordering::Acquire)
    {
        if now >> 32 != value >> 32 {
            return;
        }
        value = now;
    }
}

fn empty_page() -> Box<[AtomicU64; PAGE]> {
    Box::new(std::array::from_fn(|_| AtomicU64::new(0)))
}

fn words_of(blocks: &Range<u64>) -> Range<u64> {
    blocks.start / WORD_BLOCKS..blocks.end.div_ceil(WORD_BLOCKS)
}

/// The bits of those of `blocks` that lie in this word, which has at least one.
fn bits_of(word: u64, blocks: &Range<u64>) -> u64 {
    let first = blocks.start.saturating_sub(word * WORD_BLOCKS);
    let count = (blocks.end - word * WORD_BLOCKS).min(WORD_BLOCKS) - first;
    ((1 << count) - 1) << first
}

#[cfg(test)]
mod tests;
