//! Connects the resources of a machine to one another: devices to buses, buses
//! to vCPUs. Opens nothing.

use std::any::Any;
use std::sync::Arc;

use arch::{LegacyDevice, Platform, PowerPorts, Space, layout};
use devices::bus::{Bus, BusDevice};
use devices::legacy::{Cmos, Pl031, PowerRegister, SerialPort};
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
    let reporter = Arc::new(reporter.try_clone()?);
    let add = |port: u16, len, request, ending: Ending| {
        let reporter = Arc::clone(&reporter);
        let register = PowerRegister::new(request, move || reporter.ended(ending.clone()));
        buses.pio.insert(port.into(), len, Arc::new(register))
    };
    let (reset, pulse) = (PowerPorts::RESET_VALUE, PowerPorts::PULSE_RESET);
    add(
        ports.sleep_control,
        2,
        PowerPorts::POWER_OFF,
        Ending::PoweredOff,
    )?;
    add(ports.reset, 1, (u8::MAX, reset), Ending::Reset)?;
    add(ports.keyboard, 1, (u8::MAX, pulse), Ending::Reset)?;
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
    fn the_registers_that_the_tables_name_end_the_machine() {
        use super::*;
        let (reporter, reports) = crate::reports::channel().unwrap();
        let buses = Buses {
            pio: Arc::new(Bus::new()),
            mmio: Arc::new(Bus::new()),
            pause: Arc::default(),
        };
        add_power(&buses, &reporter).unwrap();
        let ports = layout::POWER.unwrap();
        let mut status = [0xff];
        assert!(buses.pio.read(ports.sleep_status.into(), &mut status));
        assert_eq!(status, [0]);
        let off = PowerPorts::S5 << 2 | 1 << 5;
        for (port, value, ending) in [
            (ports.sleep_status, off, None),
            (ports.sleep_control, off, Some(Ending::PoweredOff)),
            (ports.reset, PowerPorts::RESET_VALUE, Some(Ending::Reset)),
            (ports.keyboard, 0xfe, Some(Ending::Reset)),
            (ports.keyboard, 0xd1, None),
        ] {
            assert!(buses.pio.write(port.into(), &[value]));
            assert_eq!(reports.take(), ending, "{port:#x}");
        }
    }
}
