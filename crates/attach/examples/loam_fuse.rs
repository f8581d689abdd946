//! loam's FUSE server under a loop device with a device that is always at hand, to be compared with `bare_fuse`.
//!
//! ```text
//! loam_fuse [DEVICE] [THREADS | uring]   DEVICE as on the command line of loam, "pattern:4EiB" by default
//!                                        serves until standard input is closed; prints the loop device, then the counters
//! ```

use std::io::{Read, Write};

use loam_attach::fuse::Engine;
use loam_attach::holder::FdStore;
use loam_attach::{AttachOptions, LoopTransport};
use loam_block::DeviceSpec;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let spec: DeviceSpec = arguments.next().as_deref().unwrap_or("pattern:4EiB").parse()?;
    let mut options = AttachOptions::default();
    match arguments.next().as_deref() {
        Some("uring") => options.server.engine = Engine::Uring,
        Some(number) => options.server.threads = Some(number.parse()?),
        None => {}
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let store = FdStore::none();
    let device = spec.open(Default::default())?;
    let mut attachment = LoopTransport::attach(device, runtime.handle().clone(), &options, &store)?;
    println!("{}", attachment.device_path().display());
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    println!("{:?}", attachment.stats());
    attachment.detach(&store)?;
    Ok(())
}
