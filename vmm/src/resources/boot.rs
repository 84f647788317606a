//! The kernel and the initial ramdisk of a guest.

use std::fs::File;
use std::path::{Path, PathBuf};

use arch::Platform;
use arch::boot::Entry;
use devices::error::Chain;
use devices::host_file;
use iommu::GuestRam;

use crate::build_error::BuildError;
use crate::config::ConfigError;

const KERNEL_FIELD: &str = "boot-source.kernel_image_path";
const INITRD_FIELD: &str = "boot-source.initrd_path";

/// Kernel and initial ramdisk, open for reading.
#[derive(Debug)]
pub(crate) struct BootFiles {
    kernel: BootFile,
    initrd: Option<BootFile>,
}

#[derive(Debug)]
struct BootFile {
    field: &'static str,
    path: PathBuf,
    file: File,
}

impl BootFiles {
    /// Opens the files.
    ///
    /// # Errors
    /// A file cannot be opened or is not a regular file; named by its field.
    pub(crate) fn open(kernel: &Path, initrd: Option<&Path>) -> Result<Self, ConfigError> {
        let initrd = initrd.map(|path| BootFile::open(INITRD_FIELD, path));
        Ok(Self {
            kernel: BootFile::open(KERNEL_FIELD, kernel)?,
            initrd: initrd.transpose()?,
        })
    }

    /// Loads the files and the firmware tables of `platform` into `ram`.
    ///
    /// # Errors
    /// The guest cannot boot a file or the command line; named by its field.
    pub(crate) fn load(mut self, ram: &GuestRam, platform: &Platform) -> Result<Entry, BuildError> {
        let initrd = self.initrd.as_mut().map(|initrd| &mut initrd.file);
        let loaded = arch::boot::load(ram, platform, &mut self.kernel.file, initrd);
        loaded.map_err(|error| match (error, &self.initrd) {
            (arch::Error::Kernel(why), _) => self.kernel.refused(&why).into(),
            (arch::Error::Initrd(why), Some(initrd)) => initrd.refused(&why).into(),
            (arch::Error::Cmdline { len, max }, _) => {
                let problem = format!("is {len} bytes long and the kernel takes {max}; shorten it");
                ConfigError::new("boot-source.boot_args", problem).into()
            }
            (other, _) => BuildError::Boot(other),
        })
    }
}

impl BootFile {
    fn open(field: &'static str, path: &Path) -> Result<Self, ConfigError> {
        let opened = host_file::open_boot_file(path);
        Ok(Self {
            field,
            path: path.to_owned(),
            file: opened.map_err(|error| ConfigError::of_file(field, path, &error))?,
        })
    }

    fn refused(&self, why: &arch::kernel::Error) -> ConfigError {
        let problem = format!("{} {}", self.path.display(), Chain(why));
        ConfigError::new(self.field, problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_cannot_be_booted_is_named_with_its_field() {
        for (path, why) in [("/nowhere", "No such file"), ("/dev", "not a regular file")] {
            let error = BootFiles::open(Path::new(path), None)
                .unwrap_err()
                .to_string();
            let start = format!("{KERNEL_FIELD}: {path} ");
            assert!(error.starts_with(&start) && error.contains(why), "{error}");
        }
    }
}
