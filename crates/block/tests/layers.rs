//! Every layer, and any two on one another, keep the contract of `BlockDevice`.

use std::sync::Arc;

use loam_block::conformance::{Contents, Profile, run};
use loam_block::layer::{LayerSpec, wrap_all};
use loam_block::{
    Access, BlockDevice, ErrorKind, FileDevice, FileOptions, Io, MemoryDevice, PatternDevice, Result,
    WriteFlags, ZeroFlags,
};
use proptest::prelude::*;

/// Layers that let a device keep its contract (`fault` only where it strikes nothing).
const LAYERS: [&str; 24] = [
    "nozero",
    "nozero,zero=emulate",
    "nozero,zero=emulate,fast-zero=ignore",
    "nozero,zero=notrim",
    "nozero,zero=plugin,fast-zero=none",
    "nozero,zero=plugin,fast-zero=slow",
    "nozero,zero=plugin,fast-zero=ignore",
    "delay,read=1us,write=1us,zero=1us,trim=1us,flush=1us,extents=1us,prefetch=1us,per=8K",
    "delay,zero=1us,fast-zero=false",
    "log,file=/dev/null",
    "stats,file=/dev/null",
    "stats,file=/dev/null,format=json",
    "blocksize",
    "blocksize,maximum=12K,maximum-length=20K",
    "blocksize,minimum=4K,parallel=3,maximum=8K",
    "blocksize,minimum=16K",
    "blocksize,offer=512",
    "blocksize,offer=4K,preferred=64K",
    "noextents",
    "readonly",
    "fault,rate=0",
    "fault,after=1000000000",
    "rate,total=10G",
    "rate,read=20G,write=20G,burst=1ms",
];

fn layers(texts: &[&str]) -> Vec<LayerSpec> {
    texts.iter().map(|text| text.parse().expect(text)).collect()
}

/// `None` where the layers do not go together (zeroes passed on to what has none).
fn wrap(texts: &[&str], inner: Arc<dyn BlockDevice>) -> Option<Arc<dyn BlockDevice>> {
    match wrap_all(&layers(texts), inner) {
        Ok(device) => Some(device),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Invalid, "{texts:?}");
            None
        }
    }
}

fn contents(device: &dyn BlockDevice) -> Contents {
    if device.capabilities().write { Contents::Stored } else { Contents::Fixed }
}

#[test]
fn each_layer_over_memory_a_file_and_a_pattern() {
    for layer in LAYERS {
        let inner: [Arc<dyn BlockDevice>; 3] = [
            Arc::new(MemoryDevice::new(1 << 20)),
            Arc::new(FileDevice::in_memory(1 << 20).expect("memory")),
            Arc::new(PatternDevice::new(1 << 20)),
        ];
        for inner in inner {
            let Some(device) = wrap(&[layer], inner) else { continue };
            run(&*device, &Profile { contents: contents(&*device), seed: 3, operations: 80 });
        }
    }
}

#[test]
fn an_unaligned_client_of_a_direct_file() {
    let directory = tempfile::tempdir_in("/var/tmp").expect("temporary directory");
    let options = FileOptions { direct: true, ..FileOptions::default() };
    let file = FileDevice::create(directory.path().join("file"), 1 << 20, options).expect("file");
    assert!(file.geometry().minimum_block > 1, "direct I/O keeps sectors");
    let device = wrap(&["blocksize"], Arc::new(file)).expect("layers");
    assert_eq!(device.geometry().minimum_block, 1);
    run(&*device, &Profile { operations: 200, ..Profile::default() });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn any_two_layers(upper in 0..LAYERS.len(), lower in 0..LAYERS.len(), file: bool, seed in 0u64..1000) {
        let inner: Arc<dyn BlockDevice> = match file {
            true => Arc::new(FileDevice::in_memory(1 << 20).expect("memory")),
            false => Arc::new(MemoryDevice::new(1 << 20)),
        };
        if let Some(device) = wrap(&[LAYERS[upper], LAYERS[lower]], inner) {
            run(&*device, &Profile { contents: contents(&*device), seed, operations: 60 });
        }
    }
}

/// Layers that neither wait nor change what a device offers, beyond what their name says.
const TRANSPARENT: [&str; 9] = [
    "nozero,zero=plugin",
    "delay,flush=1us",
    "log,file=/dev/null",
    "stats,file=/dev/null",
    "blocksize",
    "noextents",
    "readonly",
    "fault,rate=0",
    "rate,total=1000G",
];

#[test]
fn what_is_ready_below_is_ready_above() {
    let device = wrap(&TRANSPARENT, Arc::new(MemoryDevice::new(1 << 20))).expect("layers");
    assert!(device.read(4096, &mut [0; 4096]).is_ready());
    assert!(device.extents(0, 4096, 1).is_ready() && device.locality(0, 4096, 1).is_ready());
    assert!(device.prefetch(0, 4096).is_ready());
    let writable: Vec<_> = TRANSPARENT.into_iter().filter(|layer| *layer != "readonly").collect();
    let device = wrap(&writable, Arc::new(MemoryDevice::new(1 << 20))).expect("layers");
    assert!(device.write(4096, &[1; 4096], WriteFlags::default()).is_ready());
    assert!(device.write_zeroes(4096, 4096, ZeroFlags::default()).is_ready());
    assert!(device.trim(4096, 4096).is_ready());
}

#[test]
fn capabilities_pass_through() {
    let inner = Arc::new(MemoryDevice::new(1 << 20));
    let all = inner.capabilities();
    for layer in TRANSPARENT {
        let now = wrap(&[layer], inner.clone()).expect("layer").capabilities();
        let expected = match layer {
            "noextents" => loam_block::Capabilities { extents: false, ..all },
            "readonly" => {
                loam_block::Capabilities { write: false, trim: false, zero: false, fast_zero: false, ..all }
            }
            _ => all,
        };
        assert_eq!(now, expected, "{layer}");
    }
}

#[tokio::test]
async fn without_extents_all_is_data() -> Result<()> {
    let device = wrap(&["noextents"], Arc::new(MemoryDevice::new(1 << 20))).expect("layer");
    let extents = device.extents(4096, 8192, 9).await?;
    let data = loam_block::Extent { offset: 4096, length: 8192, kind: loam_block::ExtentKind::Data };
    assert_eq!(extents, [data]);
    Ok(())
}

/// A device that says of itself what no simple device says, and fails in its own words.
struct Peculiar;

impl BlockDevice for Peculiar {
    fn geometry(&self) -> loam_block::Geometry {
        loam_block::Geometry {
            size: 1 << 20,
            minimum_block: 512,
            preferred_block: 8192,
            maximum_block: 1 << 16,
        }
    }

    fn capabilities(&self) -> loam_block::Capabilities {
        loam_block::Capabilities { lazy: true, rotational: Some(true), ..Default::default() }
    }

    fn read<'a>(&'a self, offset: u64, _buffer: &'a mut [u8]) -> Io<'a, ()> {
        Io::Ready(Err(loam_block::Error::new(ErrorKind::Changed, format!("peculiar at {offset}"))))
    }

    fn locality(&self, offset: u64, length: u64, _limit: usize) -> Io<'_, Vec<loam_block::Locality>> {
        let length = length.min(4096);
        Io::Ready(Ok(vec![loam_block::Locality { offset, length, local: offset == 0 }]))
    }

    fn prefetch(&self, _offset: u64, length: u64) -> Io<'_, ()> {
        let result =
            if length == 8192 { Ok(()) } else { Err(loam_block::Error::new(ErrorKind::Unavailable, "far")) };
        Io::Ready(result)
    }

    fn flush(&self) -> Io<'_, ()> {
        Io::Ready(Err(loam_block::Error::new(ErrorKind::WritesLost, "lost")))
    }
}

#[tokio::test]
async fn locality_prefetch_flush_and_errors_pass_through() -> Result<()> {
    for layer in LAYERS {
        let Some(device) = wrap(&[layer], Arc::new(Peculiar)) else { continue };
        let capabilities = device.capabilities();
        assert!(capabilities.lazy && capabilities.rotational == Some(true), "{layer}");
        let runs = device.locality(0, 1 << 16, 8).await?;
        assert!((runs[0].length, runs[0].local) == (4096, true), "{layer}");
        let aligned = if layer.contains("minimum=16K") { 16 << 10 } else { 4096 };
        let runs = device.locality(aligned, 1 << 16, 8).await?;
        assert!((runs[0].offset, runs[0].length, runs[0].local) == (aligned, 4096, false), "{layer}");
        if !layer.contains("minimum=16K") {
            device.prefetch(0, 8192).await?;
        }
        let error = device.prefetch(0, 16384).await.expect_err("too far");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{layer}");
        assert_eq!(device.flush().await.expect_err("flush").kind(), ErrorKind::WritesLost, "{layer}");
        let error = device.read(4096, &mut [0; 4096]).await.expect_err("peculiar");
        assert_eq!(error.kind(), ErrorKind::Changed, "{layer}");
        assert!(error.to_string().starts_with("peculiar at "), "{layer}: {error}");
    }
    Ok(())
}

#[test]
fn locations_pass_where_nobody_has_to_look() {
    let inner: Arc<dyn BlockDevice> = Arc::new(FileDevice::in_memory(1 << 20).expect("memory"));
    for layer in LAYERS {
        let device = wrap(&[layer], inner.clone()).expect("layer");
        let named = device.locate(0, 4096, Access::Unseen).is_some();
        let passes = ["nozero", "noextents", "readonly"].iter().any(|name| layer.starts_with(name));
        assert_eq!(named, passes, "{layer}");
    }
}
