use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::super::layout::Shape;
use super::super::store::{Local, Store};
use super::*;

#[test]
fn bits_and_words_of_runs() {
    assert_eq!((words_of(&(0..32)), bits_of(0, &(0..32))), (0..1, 0xFFFF_FFFF));
    assert_eq!((words_of(&(31..33)), bits_of(0, &(31..33)), bits_of(1, &(31..33))), (0..2, 1 << 31, 1));
    assert_eq!((words_of(&(70..71)), bits_of(2, &(70..71))), (2..3, 1 << 6));
    assert_eq!(bits_of(1, &(5..500)), 0xFFFF_FFFF);
}

#[test]
fn a_run_is_proven_when_each_of_its_blocks_is() {
    let proofs = Proofs::new(20_000);
    let prove = |blocks: Range<u64>| proofs.prove(&blocks, proofs.generation(&blocks));
    for run in [0..1, 3..31, 31..32, 8190..8195, 19_999..20_000] {
        assert_eq!(proofs.proven(&run), None);
        prove(run.clone());
        assert!(proofs.proven(&run).is_some(), "{run:?}");
    }
    for run in [0..2, 2..4, 31..33, 8189..8191, 8194..8196] {
        assert_eq!(proofs.proven(&run), None, "{run:?}");
    }
    prove(1..3);
    assert!(proofs.proven(&(0..32)).is_some());
    prove(100..100 + 1024);
    assert!(proofs.proven(&(100..1124)).is_some(), "4 MiB that begin anywhere");
    prove(2000..4000);
    assert_eq!(proofs.proven(&(2000..2001)), None, "more than that goes unheard");
}

#[test]
fn what_is_revoked_is_no_longer_proven_and_nobody_who_began_before_can_say_so() {
    let proofs = Proofs::new(4096);
    let (run, whole) = (40..44, 0..256);
    let early = proofs.generation(&whole);
    proofs.prove(&whole, early);
    let unseen = proofs.proven(&whole).unwrap();
    let (of_run, of_others) = (proofs.proven(&run).unwrap(), proofs.proven(&(64..256)).unwrap());
    assert!(proofs.still_proven(&whole, unseen));
    proofs.revoke(&run);
    assert_eq!((proofs.proven(&run), proofs.proven(&(39..41)), proofs.proven(&whole)), (None, None, None));
    assert!(proofs.proven(&(0..40)).is_some() && proofs.proven(&(44..256)).is_some(), "the others stay");
    assert!(proofs.still_proven(&(64..256), of_others));
    for late in [early, unseen] {
        proofs.prove(&whole, late);
        assert_eq!(proofs.proven(&run), None, "the check began before the drop");
    }
    proofs.prove(&whole, proofs.generation(&whole));
    assert!(proofs.proven(&whole).is_some());
    assert!(!proofs.still_proven(&whole, unseen) && !proofs.still_proven(&run, of_run), "dropped in between");
}

#[test]
fn bits_are_added_to_the_generation_that_was_seen_and_to_no_other() {
    let (first, second) = (ONE_GENERATION, 2 * ONE_GENERATION);
    for (now, seen, then) in [
        (first, first, first | 0b110),
        (first | 1, first, first | 0b111),
        (second, first, second),
        (second | 1, first | 1, second | 1),
    ] {
        let word = AtomicU64::new(now);
        add_bits(&word, seen, 0b110);
        assert_eq!(word.into_inner(), then, "{now:#x} seen as {seen:#x}");
    }
}

/// The file and the state of one chunk of one block, as the threads of [`every_interleaving_of_drop_check_and_read`] know
/// them: which storing of the chunk the file holds (0: a hole).
#[derive(Clone, Copy, Default)]
struct Chunk {
    held: u32,
    present: bool,
}

/// One thread: how far it is and what it remembers.
#[derive(Clone, Copy, Default)]
struct Thread {
    step: usize,
    generation: Option<Generation>,
    held: u32,
}

struct World {
    proofs: Proofs,
    chunk: Chunk,
    checked: HashSet<u32>,
    stored: u32,
}

const BLOCK: Range<u64> = 7..8;
/// Steps of whoever drops and stores, of the checking reader, and of the reader that does not see.
const STEPS: [usize; 3] = [5, 4, 3];

impl World {
    /// Does the next step of a thread; the reader's last says whether it gives out what it read.
    fn step(&mut self, thread: usize, of: &mut Thread) -> bool {
        let step = (thread, of.step);
        of.step += 1;
        match step {
            (0, 0) => self.chunk.present = false,
            (0, 1) => self.proofs.revoke(&BLOCK),
            (0, 2) => self.chunk.held = 0,
            (0, 3) => {
                self.stored += 1;
                self.chunk.held = self.stored;
            }
            (0, _) => self.chunk.present = true,
            (1, 0) => of.generation = Some(self.proofs.generation(&BLOCK)),
            (1, 1) if !self.chunk.present => of.generation = None,
            (1, 1) => {}
            (1, 2) => of.held = self.chunk.held,
            (1, _) => {
                if let Some(seen) = of.generation.filter(|_| of.held != 0) {
                    self.checked.insert(of.held);
                    self.proofs.prove(&BLOCK, seen);
                }
            }
            (_, 0) => of.generation = self.proofs.proven(&BLOCK),
            (_, 1) => of.held = self.chunk.held,
            _ => return of.generation.is_some_and(|seen| self.proofs.still_proven(&BLOCK, seen)),
        }
        false
    }
}

/// Plays the order of steps that `order` (digits of threads) says, from a chunk that is stored and proven.
fn play(order: &[usize]) {
    let mut world = World {
        proofs: Proofs::new(32),
        chunk: Chunk { held: 1, present: true },
        checked: HashSet::from([1]),
        stored: 1,
    };
    world.proofs.prove(&BLOCK, world.proofs.generation(&BLOCK));
    let mut threads = [Thread::default(); 3];
    for thread in order {
        let of = &mut threads[*thread];
        let given_out = world.step(*thread, of);
        assert!(
            !given_out || world.checked.contains(&of.held),
            "{order:?}: {} was given out unchecked",
            of.held
        );
    }
}

#[test]
fn every_interleaving_of_drop_check_and_read() {
    fn go(order: &mut Vec<usize>, left: [usize; 3], played: &mut u32) {
        if left == [0; 3] {
            play(order);
            *played += 1;
            return;
        }
        for thread in 0..3 {
            let mut left = left;
            if left[thread] > 0 {
                left[thread] -= 1;
                order.push(thread);
                go(order, left, played);
                order.pop();
            }
        }
    }
    let mut played = 0;
    go(&mut Vec::new(), STEPS, &mut played);
    assert_eq!(played, 27_720, "12! / (5! 4! 3!)");
}

/// The same with the real store and threads: one drops and stores chunks, others read as a transport does.
#[test]
fn nothing_wrong_is_settled_while_chunks_come_and_go() {
    const CHUNK: u64 = 8192;
    const CHUNKS: u64 = 4;
    const TIME: Duration = Duration::from_millis(1500);
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let shape = Shape::new(CHUNKS * CHUNK, CHUNK as u32).unwrap();
    let store = Store::create(directory.path(), "k", shape).unwrap();
    store.open_files().unwrap();
    let content: Vec<u8> = (0..CHUNKS * CHUNK).map(|at| (at / 512) as u8 | 1).collect();
    let of_chunk = |chunk: u64| &content[(chunk * CHUNK) as usize..][..CHUNK as usize];
    (0..CHUNKS).for_each(|chunk| store.fill(chunk, of_chunk(chunk)).unwrap());
    let (settled, refused, over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let read = |file: std::os::fd::BorrowedFd<'_>, offset: u64, bytes: &mut [u8]| {
        assert_eq!(rustix::io::pread(file.as_fd(), &mut *bytes, offset).unwrap(), bytes.len());
        bytes == &content[offset as usize..][..bytes.len()]
    };
    // Every run of blocks in turn, over chunks' bounds too.
    let runs = || {
        (0..CHUNKS * 2)
            .flat_map(|from| (1..4).map(move |blocks| (from * 4096, blocks * 4096)))
            .filter(|(offset, length)| offset + length <= CHUNKS * CHUNK)
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let begun = Instant::now();
            for chunk in (0..CHUNKS).cycle() {
                store.drop_run(chunk, 1);
                store.fill(chunk, of_chunk(chunk)).unwrap();
                // Time for the chunk to be proven and read.
                std::thread::sleep(Duration::from_micros(chunk * 30));
                if begun.elapsed() > TIME {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
        });
        scope.spawn(|| {
            let mut bytes = [0; 3 * 4096];
            while !over.load(Ordering::Relaxed) {
                for (offset, length) in runs() {
                    if store.try_read(offset, &mut bytes[..length as usize]) == Local::Hit {
                        assert_eq!(bytes[..length as usize], content[offset as usize..][..length as usize]);
                    }
                }
            }
        });
        scope.spawn(|| {
            let mut bytes = [0; 3 * 4096];
            while !over.load(Ordering::Relaxed) {
                for (offset, length) in runs() {
                    let bytes = &mut bytes[..length as usize];
                    if let Some((file, seen)) = store.locate_unseen(offset, length) {
                        let right = read(file, offset, bytes);
                        let given_out = store.settle_unseen(offset, length, seen);
                        assert!(right || !given_out, "{length} bytes at {offset} were settled unseen");
                        if given_out { &settled } else { &refused }.fetch_add(1, Ordering::Relaxed);
                    }
                    if let Some((file, seen)) = store.locate_seen(offset, length) {
                        let right = read(file, offset, bytes);
                        assert!(
                            right || !store.settle_seen(offset, bytes, seen),
                            "settled, and seen to be wrong"
                        );
                    }
                }
            }
        });
    });
    let (settled, refused) = (settled.into_inner(), refused.into_inner());
    assert!(settled > 0 && refused > 0, "{settled} settled and {refused} refused: nothing was tried");
}
