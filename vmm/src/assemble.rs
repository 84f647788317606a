//! Connects the resources of a machine to one another: devices to buses, buses
//! to vCPUs. Opens nothing.

use std::any::Any;
use std::io;
use std::sync::Arc;

use arch::{LegacyDevice, Platform, Space, layout};
use devices::bus::{Bus, BusDevice};
use devices::legacy::{
    Cmos, KEYBOARD_RESET_LEN, KeyboardReset, POWER_LEN, Pl031, Power, PowerRequest, SerialPort,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::build_error::BuildError;
use crate::console::{Input, Output};
use crate::ending::Ending;
use crate::kvm::{Buses, Vcpu, Vcpus, Vm};
use crate::metrics::Metrics;
use crate::pci::PciBus;
use crate::plan::{Console, MachinePlan};
use crate::reports::Reporter;
use crate::resources::HostResources;

/// The keyboard controller's command port (x86).
const KEYBOARD_COMMAND_PORT: u64 = 0x64;

/// A machine. Dropping it ends the guest.
///
/// Fields are dropped in order: first the vCPUs, which use all others.
pub(crate) struct Machine {
    /// The vCPU threads, paused until resumed.
    pub vcpus: Vcpus,
    /// The PCI bus and its functions.
    pub pci: Option<Arc<PciBus>>,
    output: Arc<Output>,
    /// Owns guest memory.
    _vm: Arc<dyn Any + Send + Sync>,
}

impl Machine {
    /// The guest's serial output, which outlives the machine.
    #[must_use]
    pub(crate) fn output(&self) -> Arc<Output> {
        Arc::clone(&self.output)
    }

    /// Creates a machine of these parts, without a VM.
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

/// A machine and the console input that the event loop serves.
pub(crate) struct Assembled {
    /// The machine, paused.
    pub machine: Machine,
    /// Input of the console; `None` when the console has no keyboard.
    pub input: Option<Input>,
}

/// Connects the resources acquired for `plan`. The machine is paused at its
/// first instruction. `reporter` receives its end.
///
/// # Errors
/// Two devices claim one address, the guest cannot boot the files, or the host
/// refuses an interrupt or a thread.
pub(crate) fn assemble(
    plan: &MachinePlan,
    resources: HostResources,
    metrics: &Metrics,
    reporter: &Reporter,
) -> Result<Assembled, BuildError> {
    let HostResources {
        boot,
        ram,
        vm,
        vcpus,
        caches,
        seed,
        output,
        functions,
    } = resources;
    let buses = Buses {
        pio: Arc::new(Bus::new()),
        mmio: Arc::new(Bus::new()),
        pause: Arc::default(),
    };
    let input = add_serial(plan, &vm, &buses, &output, metrics, reporter)?;
    add_clock(&buses)?;
    add_power(&buses, reporter)?;
    let pci = PciBus::assemble(plan, functions, &vm, &buses, &ram)?;
    let platform = Platform {
        cpus: u32::from(plan.vcpus),
        caches,
        ram: plan.memory.clone(),
        cmdline: plan.boot.cmdline.clone(),
        seed,
        serial: layout::SERIAL,
        rtc: layout::RTC,
        pci: pci.as_ref().map(|_| PciBus::host()),
        iommu: pci.as_ref().and_then(PciBus::iommu_node),
    };
    let entry = boot.load(&ram, &platform)?;
    for vcpu in &vcpus {
        vcpu.set_up(entry)?;
    }
    let vcpus = start_vcpus(vcpus, &buses, reporter)?;
    let machine = Machine {
        vcpus,
        output,
        pci: pci.map(Arc::new),
        _vm: vm,
    };
    Ok(Assembled { machine, input })
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

/// The x86 sleep and reset registers. aarch64 has firmware calls (PSCI)
/// instead, which KVM handles.
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

fn start_vcpus(vcpus: Vec<Vcpu>, buses: &Buses, reporter: &Reporter) -> Result<Vcpus, BuildError> {
    let ended = reporter.try_clone()?;
    let on_end = move |ending| ended.ended(ending);
    let waker = reporter.try_clone()?;
    Ok(Vcpus::spawn(vcpus, buses, on_end, move || waker.wake())?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn assembling_opens_nothing() {
        let stage = [include_str!("assemble.rs"), include_str!("pci/bus.rs")];
        for text in stage {
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            for word in ["open(", "Path", "File"] {
                assert!(!code.contains(word), "{word}");
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_tables_tell_the_guest_where_the_power_registers_are() {
        use arch::{PowerPorts, layout};
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
