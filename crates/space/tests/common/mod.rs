#![allow(unreachable_pub)]
//! The map's storage on a simulated disk.

use std::io;
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use loam_sim::{SimDisk, SimFile};
use loam_space::{Storage, StorageFile};

pub struct Sim(pub SimDisk);

pub struct File(SimFile);

#[derive(Debug)]
pub struct Mapping(Arc<[u8]>);

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Storage for Sim {
    type File = File;
    type Mapping = Mapping;

    fn location(&self) -> &Path {
        Path::new("simulated")
    }

    fn open(&self, name: &str) -> io::Result<File> {
        self.0.open(name).map(File)
    }

    fn create(&self, name: &str) -> io::Result<File> {
        self.0.create(name).map(File)
    }

    fn map(&self, name: &str) -> io::Result<Mapping> {
        Ok(Mapping(self.0.open(name)?.read_all()?.into()))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        self.0.names()
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_names()
    }
}

impl StorageFile for File {
    fn length(&self) -> io::Result<u64> {
        self.0.length()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, data)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.0.set_length(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}
