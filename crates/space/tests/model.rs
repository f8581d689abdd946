//! The map against a model: any order of adding, reopening and compacting, and any address asked for.

mod common;

use std::collections::BTreeMap;

use common::Sim;
use loam_sim::SimDisk;
use loam_space::{Address, Allocation, BLOCK, ContentId, Map, Place, Range};
use proptest::prelude::*;

/// Blocks of the space: few, so that it gets full and crowded.
const BLOCKS: u64 = 4096;

#[derive(Debug, Clone)]
enum Step {
    Content(Vec<u8>),
    Allocate { blocks: u64, alignment: u32, count: usize },
    Reserve { blocks: u64 },
    Add { block: u64, blocks: u64 },
    Compact,
    Reopen,
    PowerCycle,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Step::Content),
        4 => (1u64..40, 0u32..5, 1usize..30)
            .prop_map(|(blocks, alignment, count)| Step::Allocate { blocks, alignment, count }),
        1 => (1u64..60).prop_map(|blocks| Step::Reserve { blocks }),
        4 => (0..BLOCKS, 1u64..60).prop_map(|(block, blocks)| Step::Add { block, blocks }),
        1 => Just(Step::Compact),
        1 => Just(Step::Reopen),
        1 => Just(Step::PowerCycle),
    ]
}

/// Owner of each mapped block: content and block of the content.
#[derive(Default)]
struct Model {
    blocks: BTreeMap<u64, (ContentId, u64)>,
    contents: Vec<Vec<u8>>,
    high_water: u64,
}

impl Model {
    fn insert(&mut self, range: &Range) {
        for i in 0..range.length / BLOCK {
            let block = range.start.0 / BLOCK + i;
            let owner = (range.content, range.content_offset / BLOCK + i);
            assert_eq!(self.blocks.insert(block, owner), None, "block {block} was given out twice");
        }
        self.high_water = self.high_water.max(range.end().0 / BLOCK);
    }

    fn compare(&self, map: &Map<Sim>) {
        for block in 0..BLOCKS {
            let address = Address(block * BLOCK + block % BLOCK);
            match (map.locate(address), self.blocks.get(&block)) {
                (Place::Mapped(range), Some((content, content_block))) => {
                    assert_eq!(range.content, *content);
                    let offset = range.content_offset + (address.0 - range.start.0);
                    assert_eq!(offset / BLOCK, *content_block);
                }
                (Place::Unmapped { until }, None) => {
                    let next = self.blocks.range(block..).next().map_or(BLOCKS, |(next, _)| *next);
                    assert_eq!(until, Address(next * BLOCK));
                }
                (place, owner) => panic!("block {block}: {place:?}, should be {owner:?}"),
            }
        }
        let specs: Vec<_> = map.contents().into_iter().map(|(_, spec)| spec).collect();
        assert_eq!(specs, self.contents);
        assert_eq!(map.stats().mapped_bytes, self.blocks.len() as u64 * BLOCK);
        assert_eq!(map.stats().high_water, Address(self.high_water * BLOCK));
        assert_eq!(map.stats().ranges, map.ranges().count() as u64);
    }
}

fn play(steps: &[Step]) {
    let mut disk = SimDisk::new();
    let mut map = Map::create_in(Sim(disk.clone()), BLOCKS * BLOCK).expect("create");
    let mut model = Model::default();
    for step in steps {
        let contents = model.contents.len() as u64;
        match step {
            Step::Content(spec) => {
                assert_eq!(map.add_content(spec).expect("content"), ContentId(contents as u32));
                model.contents.push(spec.clone());
            }
            Step::Allocate { .. } | Step::Add { .. } if contents == 0 => {}
            Step::Allocate { blocks, alignment, count } => {
                let request = |i| Allocation {
                    content: ContentId((i as u64 % contents) as u32),
                    content_offset: i as u64 * BLOCK,
                    length: blocks * BLOCK,
                    alignment: BLOCK << alignment,
                };
                let requests: Vec<_> = (0..*count).map(request).collect();
                // Refused only when full, and then whole.
                for (range, request) in
                    map.allocate_batch(&requests).unwrap_or_default().iter().zip(&requests)
                {
                    assert!(range.start.0 >= model.high_water * BLOCK);
                    assert_eq!(range.start.0 % request.alignment, 0);
                    assert_eq!((range.content, range.length), (request.content, request.length));
                    model.insert(range);
                }
            }
            Step::Reserve { blocks } => {
                if let Ok(start) = map.reserve(blocks * BLOCK, BLOCK) {
                    assert_eq!(start.0, model.high_water * BLOCK);
                    model.high_water += blocks;
                }
            }
            Step::Add { block, blocks } => {
                let content = ContentId((block % contents) as u32);
                let (start, length) = (Address(block * BLOCK), blocks * BLOCK);
                let range = Range { start, length, content, content_offset: 0 };
                let free = model.blocks.range(*block..block + blocks).next().is_none();
                let added = map.add_ranges(&[range]).is_ok();
                assert_eq!(added, free && block + blocks <= BLOCKS, "{range:?}");
                if added {
                    model.insert(&range);
                }
            }
            Step::Compact => map.compact().expect("compact"),
            Step::Reopen | Step::PowerCycle => {
                drop(map);
                if matches!(step, Step::PowerCycle) {
                    disk = disk.power_cycle(0);
                }
                map = Map::open_in(Sim(disk.clone())).expect("open");
            }
        }
    }
    model.compare(&map);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_map_is_its_model(steps in prop::collection::vec(step(), 1..40)) {
        play(&steps);
    }
}
