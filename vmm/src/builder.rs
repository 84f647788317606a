//! Builds the machine a [`MachinePlan`] describes, stage by stage.
//!
//! Each stage is a function from what earlier stages made to one thing more;
//! [`build`] is their order. Whatever fails, nothing is left behind: what was
//! made is dropped.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use arch::{LegacyDevice, Platform, Space, layout};
use devices::bus::{Bus, BusDevice, BusError};
use devices::error::Chain;
use devices::host_file;
use devices::legacy::{
    Cmos, KEYBOARD_RESET_LEN, KeyboardReset, POWER_LEN, Pl031, Power, PowerRequest, SerialPort,
};
use iommu::GuestRam;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::{ConfigError, HugePages, MemBacking};
use crate::console::{Input, Output};
use crate::ending::Ending;
use crate::kvm::{self, Backing, Buses, End, Vcpu, Vcpus, Vm};
use crate::metrics::Metrics;
use crate::pci::PciBus;
use crate::plan::{Console, MachinePlan};
use crate::reports::Reporter;

/// The keyboard controller's command port (x86).
const KEYBOARD_COMMAND_PORT: u64 = 0x64;

/// Why a machine cannot be built. One line for the user.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Something the user named is at fault.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// KVM or guest memory is not to be had.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// What the guest boots cannot be laid out in its memory.
    #[error(transparent)]
    Boot(arch::Error),
    /// The console cannot be set up.
    #[error("cannot set up the console")]
    Console(#[source] io::Error),
    /// Two devices claim one address.
    #[error("cannot place a device")]
    Place(#[from] BusError),
    /// The host refuses an eventfd, a timer or a thread.
    #[error("cannot set up the machine")]
    Host(#[from] io::Error),
}

/// A machine that has been built. Dropping it ends the guest.
///
/// Fields are dropped in order: the processors first, which use all else.
pub struct Machine {
    /// The processors' threads, held until resumed.
    pub vcpus: Vcpus,
    /// The PCI bus and what is on it.
    pub pci: Option<Arc<PciBus>>,
    output: Arc<Output>,
    /// Owns guest memory.
    _vm: Arc<dyn Any + Send + Sync>,
}

impl Machine {
    /// The guest's serial output, which outlives the machine.
    #[must_use]
    pub fn output(&self) -> Arc<Output> {
        Arc::clone(&self.output)
    }

    /// A machine of these parts, without a VM.
    #[cfg(test)]
    pub(crate) fn of(vcpus: Vcpus, pci: Option<PciBus>, output: Arc<Output>) -> Self {
        Self {
            vcpus,
            pci: pci.map(Arc::new),
            output,
            _vm: Arc::new(()),
        }
    }
}

/// What a build makes besides the machine.
pub struct Built {
    /// The machine, held.
    pub machine: Machine,
    /// The console's input, for the event loop; `None` when the console has no
    /// keyboard.
    pub input: Option<Input>,
}

/// Builds the machine, held at its first instruction. `reporter` will be told
/// how it ends.
///
/// # Errors
/// The first stage that failed.
pub fn build(
    plan: &MachinePlan,
    metrics: &Metrics,
    reporter: &Reporter,
) -> Result<Built, BuildError> {
    let mut files = BootFiles::open(&plan.boot.kernel, plan.boot.initrd.as_deref())?;
    let ram = Arc::new(allocate_ram(plan)?);
    let (vm, processors) = Vm::new(&ram, u32::from(plan.vcpus))?;
    let buses = Buses {
        pio: Arc::new(Bus::new()),
        mmio: Arc::new(Bus::new()),
        pause: Arc::default(),
    };
    let (file, room) = open_output(&plan.console)?;
    let output = Output::start(file, room).map_err(BuildError::Console)?;
    let input = add_serial(plan, &vm, &buses, &output, metrics, reporter)?;
    add_clock(&buses)?;
    add_power(&buses, reporter)?;
    let pci = PciBus::build(plan, &vm, &buses, &ram)?;
    load_and_set_up(plan, &ram, &mut files, &processors, pci.as_ref())?;
    let vcpus = start_processors(processors, &buses, reporter)?;
    let machine = Machine {
        vcpus,
        output,
        pci: pci.map(Arc::new),
        _vm: vm,
    };
    Ok(Built { machine, input })
}

/// The files the guest boots, open for reading.
#[derive(Debug)]
pub struct BootFiles {
    kernel: File,
    initrd: Option<File>,
}

impl BootFiles {
    /// Opens them.
    ///
    /// # Errors
    /// The one that cannot be opened or is no regular file, by its name.
    pub fn open(kernel: &Path, initrd: Option<&Path>) -> Result<Self, ConfigError> {
        Ok(Self {
            kernel: open_file(KERNEL_FIELD, kernel)?,
            initrd: initrd
                .map(|path| open_file(INITRD_FIELD, path))
                .transpose()?,
        })
    }
}

const KERNEL_FIELD: &str = "boot-source.kernel_image_path";
const INITRD_FIELD: &str = "boot-source.initrd_path";

fn open_file(field: &str, path: &Path) -> Result<File, ConfigError> {
    host_file::open_boot_file(path).map_err(|error| ConfigError::of_file(field, path, &error))
}

fn allocate_ram(plan: &MachinePlan) -> Result<GuestRam, BuildError> {
    let ranges = ram_ranges(plan);
    let backing = match plan.mem_backing {
        MemBacking::Anonymous => Backing::Anonymous,
        MemBacking::Memfd => Backing::Memfd,
    };
    let huge = plan.huge_pages == HugePages::TwoMib;
    Ok(kvm::allocate(&ranges, backing, huge)?)
}

fn ram_ranges(plan: &MachinePlan) -> Vec<arch::Range> {
    let ranges = plan.memory.iter();
    ranges
        .map(|range| arch::Range::new(range.base.0, range.size.0))
        .collect()
}

/// Opens the console's output, and says how many bytes it may take.
fn open_output(console: &Console) -> Result<(File, Option<u64>), BuildError> {
    match console {
        Console::Stdio => {
            let copy = io::stdout().as_fd().try_clone_to_owned();
            let file = copy.map(File::from).map_err(BuildError::Console)?;
            Ok((file, None))
        }
        Console::File { path, max_bytes } => {
            let field = "serial.serial_out_path";
            let opened = host_file::open_output(path);
            let file = opened.map_err(|error| ConfigError::of_file(field, path, &error))?;
            let metadata = file.metadata().map_err(BuildError::Console)?;
            if max_bytes.is_some() && !metadata.is_file() {
                let problem = format!("{} is no regular file; leave it out", path.display());
                return Err(ConfigError::new("serial.serial_out_max_mib", problem).into());
            }
            let room = max_bytes.map(|max| max.saturating_sub(metadata.len()));
            Ok((file, room))
        }
    }
}

fn add_serial(
    plan: &MachinePlan,
    vm: &Vm,
    buses: &Buses,
    output: &Arc<Output>,
    metrics: &Metrics,
    reporter: &Reporter,
) -> Result<Option<Input>, BuildError> {
    let line = Arc::new(vm.line(layout::SERIAL.gsi)?);
    let drained = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let port = Arc::new(SerialPort::new(
        line,
        output.clone(),
        drained.try_clone()?,
        Arc::clone(&metrics.serial),
    ));
    // Weak: the port holds its sink.
    let waiting = Arc::downgrade(&port);
    output.on_room(move || {
        if let Some(port) = waiting.upgrade() {
            port.transmitter_ready();
        }
    });
    place(buses, layout::SERIAL, port.clone())?;
    if plan.console != Console::Stdio {
        return Ok(None);
    }
    let reporter = reporter.try_clone()?;
    let quit = move || reporter.ended(Ending::Stopped);
    let input = Input::new(port, drained, quit).map_err(BuildError::Console)?;
    Ok(Some(input))
}

fn add_clock(buses: &Buses) -> Result<(), BuildError> {
    let clock: Arc<dyn BusDevice> = if cfg!(target_arch = "x86_64") {
        Arc::new(Cmos::new())
    } else {
        Arc::new(Pl031::new())
    };
    place(buses, layout::RTC, clock)
}

/// x86's sleep and reset registers. Elsewhere firmware calls take their place,
/// and KVM answers those.
fn add_power(buses: &Buses, reporter: &Reporter) -> Result<(), BuildError> {
    let Some(ports) = layout::POWER else {
        return Ok(());
    };
    let request = || -> io::Result<_> {
        let reporter = reporter.try_clone()?;
        Ok(move |request| {
            reporter.ended(match request {
                PowerRequest::Off => Ending::PoweredOff,
                PowerRequest::Reset => Ending::Reset,
            });
        })
    };
    let registers = Arc::new(Power::new(request()?));
    let pio = &buses.pio;
    pio.insert(u64::from(ports.sleep_control), POWER_LEN, registers)?;
    let keyboard = Arc::new(KeyboardReset::new(request()?));
    pio.insert(KEYBOARD_COMMAND_PORT, KEYBOARD_RESET_LEN, keyboard)?;
    Ok(())
}

fn place(buses: &Buses, at: LegacyDevice, device: Arc<dyn BusDevice>) -> Result<(), BuildError> {
    let bus = match at.space {
        Space::Pio => &buses.pio,
        Space::Mmio => &buses.mmio,
    };
    Ok(bus.insert(at.regs.base, at.regs.size, device)?)
}

/// What the firmware tables tell the guest.
fn describe(plan: &MachinePlan, processors: &[Vcpu], pci: Option<&PciBus>) -> io::Result<Platform> {
    // The guest would otherwise wait for entropy it has no source of.
    let mut seed = [0; 32];
    getrandom::fill(&mut seed)?;
    Ok(Platform {
        cpus: u32::from(plan.vcpus),
        caches: processors.first().map_or_else(Vec::new, Vcpu::caches),
        ram: ram_ranges(plan),
        cmdline: plan.boot.cmdline.clone(),
        seed,
        serial: layout::SERIAL,
        rtc: layout::RTC,
        pci: pci.map(|_| PciBus::host()),
        iommu: pci.and_then(PciBus::iommu_node),
    })
}

fn load_and_set_up(
    plan: &MachinePlan,
    ram: &GuestRam,
    files: &mut BootFiles,
    processors: &[Vcpu],
    pci: Option<&PciBus>,
) -> Result<(), BuildError> {
    let platform = describe(plan, processors, pci)?;
    let kernel = &mut files.kernel;
    let entry = arch::boot::load(ram, &platform, kernel, files.initrd.as_mut())
        .map_err(|error| name_file(plan, error))?;
    for processor in processors {
        processor.set_up(entry)?;
    }
    Ok(())
}

/// Says which file an error of the loader is about.
fn name_file(plan: &MachinePlan, error: arch::Error) -> BuildError {
    let (field, path, why) = match (error, &plan.boot.initrd) {
        (arch::Error::Kernel(why), _) => (KERNEL_FIELD, &plan.boot.kernel, why),
        (arch::Error::Initrd(why), Some(path)) => (INITRD_FIELD, path, why),
        (arch::Error::Cmdline { len, max }, _) => {
            let problem = format!("is {len} bytes long and the kernel takes {max}; shorten it");
            return ConfigError::new("boot-source.boot_args", problem).into();
        }
        (other, _) => return BuildError::Boot(other),
    };
    let problem = format!("{} {}", path.display(), Chain(&why));
    ConfigError::new(field, problem).into()
}

fn start_processors(
    processors: Vec<Vcpu>,
    buses: &Buses,
    reporter: &Reporter,
) -> Result<Vcpus, BuildError> {
    let ended = reporter.try_clone()?;
    let on_end = move |end| {
        ended.ended(match end {
            End::PowerOff => Ending::PoweredOff,
            End::Reset => Ending::Reset,
            End::Crash {
                vcpu,
                reason,
                registers,
            } => {
                log::error!("vCPU {vcpu}: {reason}");
                for line in registers.lines() {
                    log::error!("{line}");
                }
                Ending::Crashed(format!(
                    "{reason} on vCPU {vcpu}; its registers are in the log"
                ))
            }
        });
    };
    let waker = reporter.try_clone()?;
    Ok(Vcpus::spawn(processors, buses, on_end, move || {
        waker.wake()
    })?)
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

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_tables_tell_the_guest_where_the_power_registers_are() {
        use arch::PowerPorts;
        use devices::legacy::{
            POWER_OFF_SLEEP_TYPE, RESET_OFFSET, RESET_VALUE, SLEEP_CONTROL_OFFSET,
            SLEEP_STATUS_OFFSET,
        };
        let ports = layout::POWER.unwrap();
        let offset = |port: u16| u64::from(port - ports.sleep_control);
        assert_eq!(offset(ports.sleep_control), SLEEP_CONTROL_OFFSET);
        assert_eq!(offset(ports.sleep_status), SLEEP_STATUS_OFFSET);
        assert_eq!(offset(ports.reset), RESET_OFFSET);
        assert_eq!(PowerPorts::S5, POWER_OFF_SLEEP_TYPE);
        assert_eq!(PowerPorts::RESET_VALUE, RESET_VALUE);
    }
}
