//! In place of the client until it is there.
#![allow(missing_docs)]
use loam_block::*;
use loam_nbd::uri::Uri;
#[derive(Debug, Clone, Default)]
pub struct ClientOptions {
    pub connections: usize,
}
#[derive(Debug, Clone, serde::Serialize)]
pub struct ExportInfo {
    pub name: String,
    pub description: String,
    pub size: u64,
}
pub struct NbdDevice(ExportInfo);
impl NbdDevice {
    pub async fn connect(uri: &Uri, _options: ClientOptions) -> Result<Self> {
        Err(Error::new(ErrorKind::NotSupported, format!("{uri}: no client yet")))
    }
    pub fn export(&self) -> &ExportInfo {
        &self.0
    }
}
pub async fn list(_uri: &Uri, _options: &ClientOptions) -> Result<Vec<ExportInfo>> {
    Ok(Vec::new())
}
impl BlockDevice for NbdDevice {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.0.size, minimum_block: 1, preferred_block: 4096, maximum_block: MAXIMUM_BLOCK }
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
    fn read<'a>(&'a self, _offset: u64, _buffer: &'a mut [u8]) -> Io<'a, ()> {
        Io::Ready(Ok(()))
    }
}
