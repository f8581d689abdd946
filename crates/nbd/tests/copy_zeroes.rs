//! Zeroes: which commands each strategy sends to which kind of destination, and that the bytes are right with all.

mod copy_support;

use std::sync::Arc;
use std::time::Duration;

use copy_support::{Shown, Zeroing, assert_same, bytes_of, striped};
use loam_block::{BlockDevice, MemoryDevice, WriteFlags, ZeroFlags};
use loam_nbd::copy::{CopyOptions, CopyReport, NoProgress, ZeroMethod, ZeroStrategy, copy};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 20 * MIB;
const DATA_RUNS: u64 = 10;

async fn run(source: &Arc<Shown>, destination: &Arc<Shown>, options: &CopyOptions) -> CopyReport {
    let report = copy(source.clone(), destination.clone(), options, &NoProgress).await.expect("copied");
    assert_same(source.as_ref(), destination.as_ref()).await;
    assert_eq!(report.data_bytes + report.zero_bytes, report.bytes);
    assert_eq!(report.commands.write, Shown::count(&destination.writes));
    assert_eq!(report.commands.zero, Shown::count(&destination.zeroes));
    assert!(Shown::count(&destination.flushes) >= 1, "always flushed");
    report
}

async fn source() -> Arc<Shown> {
    Arc::new(Shown::new(striped(SIZE, MIB).await))
}

/// A destination full of other bytes.
async fn dirty(zeroing: Zeroing, extents: bool) -> Arc<Shown> {
    let memory = MemoryDevice::new(SIZE);
    memory.write(0, &vec![0xEE; SIZE as usize], WriteFlags::default()).await.expect("memory");
    Arc::new(Shown { zeroing, extents, ..Shown::new(memory) })
}

fn with(zero: ZeroStrategy) -> CopyOptions {
    CopyOptions { zero, ..CopyOptions::default() }
}

#[tokio::test]
async fn auto_sends_data_runs_and_two_commands_where_zeroing_is_fast() {
    for extents in [false, true] {
        let destination = dirty(Zeroing::Fast, extents).await;
        let report = run(&source().await, &destination, &with(ZeroStrategy::Auto)).await;
        assert_eq!(report.zero_method, ZeroMethod::Prezero);
        assert_eq!((report.commands.write, report.commands.zero), (DATA_RUNS, 1));
        assert!(Shown::count(&destination.asked) <= 1);
        assert_eq!(report.data_bytes, SIZE / 2);
    }
}

#[tokio::test]
async fn auto_does_not_touch_what_is_zero() {
    let fresh = Arc::new(Shown { zeroing: Zeroing::None, ..Shown::new(MemoryDevice::new(SIZE)) });
    let report = run(&source().await, &fresh, &with(ZeroStrategy::Auto)).await;
    assert_eq!(report.zero_method, ZeroMethod::KnownZero);
    assert_eq!((report.commands.write, report.commands.zero), (DATA_RUNS, 0));

    let told = Arc::new(Shown { extents: false, ..Shown::new(MemoryDevice::new(SIZE)) });
    let options = CopyOptions { destination_is_zero: true, ..CopyOptions::default() };
    let report = run(&source().await, &told, &options).await;
    assert_eq!((report.commands.write, report.commands.zero), (DATA_RUNS, 0));
    assert_eq!(Shown::count(&told.asked), 0);
}

#[tokio::test]
async fn auto_zeroes_by_hole_where_zeroing_is_not_fast() {
    for zeroing in [Zeroing::NotFast, Zeroing::NoFast] {
        let destination = dirty(zeroing, false).await;
        let report = run(&source().await, &destination, &with(ZeroStrategy::Auto)).await;
        assert_eq!(report.zero_method, ZeroMethod::PerHole);
        let probes = u64::from(zeroing == Zeroing::NotFast);
        assert_eq!((report.commands.write, report.commands.zero), (DATA_RUNS, 10 + probes), "{zeroing:?}");
        assert_eq!(Shown::count(&destination.fast_zeroes), probes);
    }
}

#[tokio::test]
async fn auto_writes_zeroes_where_there_is_no_zeroing_or_it_is_refused() {
    for zeroing in [Zeroing::None, Zeroing::Liar] {
        let destination = dirty(zeroing, false).await;
        let report = run(&source().await, &destination, &with(ZeroStrategy::Auto)).await;
        assert_eq!(report.zero_method, ZeroMethod::Write, "{zeroing:?}");
        assert_eq!(report.commands.write, 20);
        assert_eq!(report.zero_bytes, SIZE / 2);
    }
}

#[tokio::test]
async fn auto_touches_only_what_is_not_zero_of_a_destination_that_knows() {
    let destination = dirty(Zeroing::None, true).await;
    // Holes over the source's data, over one hole, and over the half of another.
    for (offset, length) in [(0, MIB), (3 * MIB, MIB), (5 * MIB, MIB / 2)] {
        destination.memory.write_zeroes(offset, length, ZeroFlags::default()).await.expect("memory");
    }
    let report = run(&source().await, &destination, &with(ZeroStrategy::Auto)).await;
    assert_eq!(report.commands.write, DATA_RUNS + 9);
    assert_eq!((report.data_bytes, report.zero_bytes), (SIZE / 2, SIZE / 2));
    let asked = destination.asked_ranges.lock().expect("lock").clone();
    assert!(asked.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0), "asked twice: {asked:?}");
}

#[tokio::test]
async fn the_four_historical_strategies_send_what_they_sent() {
    let cases = [
        (ZeroStrategy::Write, Zeroing::Fast, 20, 0, ZeroMethod::Write),
        (ZeroStrategy::Prezero, Zeroing::Fast, 10, 1, ZeroMethod::Prezero),
        (ZeroStrategy::Prezero, Zeroing::NotFast, 10, 1, ZeroMethod::Prezero),
        (ZeroStrategy::Prezero, Zeroing::None, 20, 0, ZeroMethod::Write),
        (ZeroStrategy::Guess, Zeroing::Fast, 10, 10, ZeroMethod::PerHole),
        (ZeroStrategy::Fast, Zeroing::Fast, 10, 1, ZeroMethod::Prezero),
        (ZeroStrategy::Fast, Zeroing::NotFast, 10, 11, ZeroMethod::PerHole),
        (ZeroStrategy::Fast, Zeroing::NoFast, 10, 10, ZeroMethod::PerHole),
        (ZeroStrategy::Fast, Zeroing::None, 20, 0, ZeroMethod::Write),
    ];
    for (strategy, zeroing, writes, zeroes, method) in cases {
        let destination = dirty(zeroing, false).await;
        let report = run(&source().await, &destination, &with(strategy)).await;
        let got = (report.commands.write, report.commands.zero, report.zero_method);
        assert_eq!(got, (writes, zeroes, method), "{strategy} on {zeroing:?}");
    }
}

#[tokio::test]
async fn zeroes_are_found_where_the_source_knows_no_extents() {
    for strategy in ZeroStrategy::ALL {
        let source = Arc::new(Shown { extents: false, ..Shown::new(striped(SIZE, MIB).await) });
        let destination = dirty(Zeroing::Fast, true).await;
        let report = run(&source, &destination, &with(strategy)).await;
        let allocated = destination.memory.allocated_bytes();
        if strategy == ZeroStrategy::Write {
            assert_eq!(allocated, SIZE);
        } else {
            assert_eq!((allocated, report.zero_bytes), (SIZE / 2, SIZE / 2), "{strategy}");
        }
    }
}

#[tokio::test]
async fn allocate_leaves_no_hole() {
    for strategy in ZeroStrategy::ALL {
        for zeroing in [Zeroing::Fast, Zeroing::NotFast, Zeroing::None] {
            let destination = Arc::new(Shown { zeroing, ..Shown::new(MemoryDevice::new(SIZE)) });
            let options = CopyOptions {
                zero: strategy,
                allocate: true,
                destination_is_zero: true,
                ..CopyOptions::default()
            };
            run(&source().await, &destination, &options).await;
            assert_eq!(destination.memory.allocated_bytes(), SIZE, "{strategy} on {zeroing:?}");
        }
    }
}

#[tokio::test]
async fn a_slow_hole_is_zeroed_in_pieces_side_by_side() {
    let memory = striped(2 * SIZE, SIZE).await;
    let source = Arc::new(Shown::new(memory));
    let full = MemoryDevice::from_bytes(&vec![0xEE; 2 * SIZE as usize]);
    let delays = (Duration::from_millis(20), Duration::from_millis(20));
    let destination = Arc::new(Shown {
        zeroing: Zeroing::NotFast,
        extents: false,
        write_delay: delays.0,
        zero_delay: delays.1,
        ..Shown::new(full)
    });
    let report = run(&source, &destination, &CopyOptions::default()).await;
    assert_eq!(report.commands.zero, 1 + SIZE / MIB);
    assert!(Shown::count(&destination.in_flight_max) > 16, "{:?}", destination.in_flight_max);
}

#[tokio::test]
async fn zeroing_that_is_slower_than_writing_is_given_up() {
    let source = Arc::new(Shown::new(striped(10 * SIZE, MIB).await));
    let destination = Arc::new(Shown {
        zeroing: Zeroing::NoFast,
        extents: false,
        write_delay: Duration::from_millis(1),
        zero_delay: Duration::from_millis(50),
        ..Shown::new(MemoryDevice::from_bytes(&vec![0xEE; 10 * SIZE as usize]))
    });
    let report = run(&source, &destination, &CopyOptions { queue_depth: 4, ..CopyOptions::default() }).await;
    assert!(report.commands.zero < 50, "{:?}", report.commands);
    assert!(report.commands.write > 150, "{:?}", report.commands);
}

#[tokio::test]
async fn a_larger_destination_keeps_what_lies_beyond() {
    let memory = MemoryDevice::from_bytes(&vec![0xEE; SIZE as usize + 5000]);
    let destination = Arc::new(Shown { extents: false, ..Shown::new(memory) });
    run(&source().await, &destination, &with(ZeroStrategy::Prezero)).await;
    assert_eq!(bytes_of(destination.as_ref()).await[SIZE as usize..], [0xEE; 5000]);
}
