//! Any extents, strategy, destination, depth and faults: the destination holds what the source holds, or there is an
//! error.

mod copy_support;

use std::sync::Arc;
use std::time::Duration;

use copy_support::{Shown, Zeroing, assert_same};
use loam_block::{BlockDevice, ErrorKind, MemoryDevice, WriteFlags};
use loam_nbd::copy::{CopyOptions, NoProgress, ZeroStrategy, copy};
use loam_sim::FaultyDevice;
use proptest::prelude::*;

/// Longest device. Pages of the memory device are 32 KiB.
const PIECES_MAX: usize = 40;

#[derive(Debug, Clone)]
struct Case {
    /// Runs of the source: kilobytes, and the byte they hold, or nothing.
    runs: Vec<(u64, Option<u8>)>,
    /// The same of the destination.
    before: Vec<(u64, Option<u8>)>,
    beyond: u64,
    strategy: ZeroStrategy,
    zeroing: Zeroing,
    source_extents: bool,
    destination_extents: bool,
    source_block: u32,
    destination_block: u32,
    maximum_block: u32,
    depth: usize,
    request: Option<u32>,
    allocate: bool,
    odd: u64,
    /// Probability and seed.
    faults: Option<(f64, u64)>,
}

fn runs() -> impl Strategy<Value = Vec<(u64, Option<u8>)>> {
    prop::collection::vec((1u64..100, prop::option::of(0u8..3)), 0..PIECES_MAX)
}

fn zeroing() -> impl Strategy<Value = Zeroing> {
    prop::sample::select(vec![Zeroing::Fast, Zeroing::NotFast, Zeroing::NoFast, Zeroing::Liar, Zeroing::None])
}

prop_compose! {
    fn case()(
        (runs, before, beyond) in (runs(), runs(), 0u64..20_000),
        strategy in prop::sample::select(ZeroStrategy::ALL.to_vec()),
        zeroing in zeroing(),
        (source_extents, destination_extents) in any::<(bool, bool)>(),
        (source_block, destination_block) in (0u32..13, 0u32..14),
        maximum_block in prop::sample::select(vec![8192u32, 60_000, 32 << 20]),
        depth in 1usize..20,
        request in prop::option::of(512u32..200_000),
        allocate in prop::bool::weighted(0.2),
        odd in 0u64..600,
        faults in prop::option::of((0.001f64..0.1, any::<u64>())),
    ) -> Case {
        Case {
            runs, before, beyond, strategy, zeroing, source_extents, destination_extents,
            source_block: 1 << source_block, destination_block: 1 << destination_block,
            maximum_block, depth, request, allocate, odd, faults,
        }
    }
}

async fn memory(size: u64, runs: &[(u64, Option<u8>)]) -> MemoryDevice {
    let device = MemoryDevice::new(size);
    let mut at = 0;
    for (kilobytes, byte) in runs {
        let length = (kilobytes * 1000).min(size - at);
        if let Some(byte) = byte {
            device.write(at, &vec![*byte; length as usize], WriteFlags::default()).await.expect("memory");
        }
        at += length;
    }
    device
}

async fn check(case: &Case) {
    let wanted: u64 = case.runs.iter().map(|(kilobytes, _)| kilobytes * 1000).sum::<u64>() + case.odd;
    let size = wanted - wanted % u64::from(case.source_block);
    let room = (size + case.beyond).next_multiple_of(case.destination_block.into());
    let source = Arc::new(Shown {
        extents: case.source_extents,
        minimum_block: case.source_block,
        ..Shown::new(memory(size, &case.runs).await)
    });
    let shown = Arc::new(Shown {
        zeroing: case.zeroing,
        extents: case.destination_extents,
        minimum_block: case.destination_block,
        maximum_block: case.maximum_block,
        ..Shown::new(memory(room, &case.before).await)
    });
    let (from, to): (Arc<dyn BlockDevice>, Arc<dyn BlockDevice>) = match case.faults {
        None => (source.clone(), shown.clone()),
        Some((rate, seed)) => {
            let faulty = |device, seed| {
                let device = FaultyDevice::new(device, seed).with_rate_failing(rate, ErrorKind::Io);
                Arc::new(device.with_delays(Duration::from_micros(50)))
            };
            (faulty(source.clone() as _, seed), faulty(shown.clone() as _, seed ^ 1))
        }
    };
    let options = CopyOptions {
        zero: case.strategy,
        queue_depth: case.depth,
        request_bytes: case.request,
        allocate: case.allocate,
        ..CopyOptions::default()
    };
    let copying = tokio::time::timeout(Duration::from_secs(20), copy(from, to, &options, &NoProgress));
    match copying.await.expect("it ends") {
        Ok(report) => {
            assert_same(source.memory.as_ref(), shown.memory.as_ref()).await;
            assert_eq!(report.data_bytes + report.zero_bytes, size);
            let written_max =
                u64::from(case.maximum_block).max(case.source_block.max(case.destination_block).into());
            assert!(Shown::count(&shown.write_max) <= written_max);
            assert!(Shown::count(&shown.flushes) >= 1);
        }
        Err(error) => assert!(case.faults.is_some(), "{error}: {:?}", std::error::Error::source(&error)),
    }
    let told = source.asked_ranges.lock().expect("lock").clone();
    assert!(told.windows(2).all(|two| two[0].0 + two[0].1 <= two[1].0), "extents asked twice: {told:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_destination_equals_the_source_or_there_is_an_error(case in case(), threads in 1usize..3) {
        let mut builder = match threads {
            1 => tokio::runtime::Builder::new_current_thread(),
            _ => tokio::runtime::Builder::new_multi_thread(),
        };
        let runtime = builder.worker_threads(2).enable_all().build().expect("runtime");
        runtime.block_on(check(&case));
    }
}
