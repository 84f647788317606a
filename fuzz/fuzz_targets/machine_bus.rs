//! Every bus access of two vCPUs in any order: configuration space, BARs,
//! MSI-X, an IOMMU with devices behind it, and the devices that are not on PCI.
//! After a reset every device works again, and accesses only mapped memory.
//!
//! With `PORTCULLIS_FUZZ_SANDBOX` in the environment every thread of the machine is confined, and a
//! vCPU is a thread of that kind. A forbidden system call then ends the target with status 148.
#![no_main]

mod driver;
mod machine;

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::thread;

use devices::thread::{ThreadKind, spawn};
use devices::virtio::pci::BAR_SIZE;
use iommu::virtio::spec::request::MAP;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use machine::guest::IommuRequest;
use machine::{BARS, CMOS, ECAM, IMAGE_LEN, KEYBOARD, Machine, PL031, POWER, SERIAL, SLOTS, SMMU};
use vmm::config::Sandbox;

/// Upper bound on operations of each vCPU.
const MAX_OPS: usize = 150;
/// Commands of the SMMUv3 (IHI 0070 §4.1.1).
const COMMANDS: [u64; 16] = [
    0x01, 0x03, 0x04, 0x05, 0x06, 0x10, 0x11, 0x12, 0x13, 0x28, 0x2a, 0x30, 0x40, 0x44, 0x45, 0x46,
];

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Op {
    Mmio {
        place: u8,
        offset: u16,
        value: u64,
        len: u8,
    },
    MmioRead {
        place: u8,
        offset: u16,
        len: u8,
    },
    Pio {
        port: u8,
        value: u32,
        len: u8,
    },
    PioRead {
        port: u8,
        len: u8,
    },
    Config {
        function: u8,
        offset: u16,
        value: u32,
        len: u8,
    },
    /// Writes a register of the common configuration.
    Common {
        function: u8,
        register: u8,
        value: u32,
    },
    BringUp {
        function: u8,
        features: u64,
        queues: u8,
    },
    Descriptor {
        function: u8,
        queue: u8,
        index: u8,
        at: u16,
        len: u16,
        flags: u8,
        next: u8,
    },
    MakeAvailable {
        function: u8,
        queue: u8,
        head: u8,
        by: u8,
    },
    Kick {
        function: u8,
        queue: u8,
    },
    Iommu {
        kind: u8,
        domain: u8,
        endpoint: u8,
        page: u8,
        pages: u8,
        gpa: u8,
        flags: u8,
    },
    Disk {
        queue: u8,
        kind: u8,
        sector: u8,
        at: u16,
        len: u16,
    },
    Memory {
        at: u16,
        value: u64,
    },
    Msix {
        function: u8,
        entry: u8,
        address: u32,
        data: u16,
        control: u8,
    },
    MoveBar {
        function: u8,
        to: u8,
    },
    Reset {
        function: u8,
    },
    FunctionLevelReset {
        function: u8,
    },
    Input {
        len: u16,
    },
    Smmu {
        stream: u8,
        config: u8,
        flags: u8,
    },
    Command {
        kind: u8,
        stream: u8,
        low: u32,
        high: u64,
    },
    /// Requests or ends a pause.
    Pause {
        end: bool,
    },
}

struct Image(PathBuf);

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

thread_local! {
    static IMAGE: RefCell<Image> = RefCell::new({
        let name = format!("portcullis-fuzz-bus-{}", std::process::id());
        Image(std::env::temp_dir().join(name))
    });
}

fn function(number: u8) -> usize {
    usize::from(number) % SLOTS.len()
}

fn place(machine: &Machine, place: u8) -> u64 {
    match place % 8 {
        0..3 => machine.bar(function(place % 8)),
        3 => ECAM,
        4 => ECAM + (u64::from(place / 8) << 12),
        5 => SMMU + if place & 8 != 0 { 0x1_0000 } else { 0 },
        6 => PL031,
        _ => BARS + u64::from(place) * 0x1000,
    }
}

fn port(port: u8) -> u64 {
    match port % 4 {
        0 => SERIAL + u64::from(port / 4 % 9),
        1 => CMOS + u64::from(port / 4 % 3),
        2 => POWER + u64::from(port / 4 % 4),
        _ => KEYBOARD,
    }
}

/// Performs accesses of a bus, and console input.
fn access(machine: &Machine, op: Op) {
    match op {
        Op::Mmio {
            place: at,
            offset,
            value,
            len,
        } => {
            let bytes = &value.to_le_bytes()[..=usize::from(len % 8)];
            let at = place(machine, at) + u64::from(offset);
            machine.memory.write(at, bytes);
        }
        Op::MmioRead {
            place: at,
            offset,
            len,
        } => {
            let bytes = &mut [0; 16][..=usize::from(len % 16)];
            let at = place(machine, at) + u64::from(offset);
            machine.memory.read(at, bytes);
        }
        Op::Pio {
            port: at,
            value,
            len,
        } => {
            let bytes = &value.to_le_bytes()[..[1, 2, 4][usize::from(len % 3)]];
            machine.ports.write(port(at), bytes);
        }
        Op::PioRead { port: at, len } => {
            let bytes = &mut [0; 4][..[1, 2, 4][usize::from(len % 3)]];
            machine.ports.read(port(at), bytes);
        }
        Op::Memory { at, value } => machine.put(u64::from(at) << 2, &value.to_le_bytes()),
        Op::Input { len } => {
            machine.serial.input(&vec![b'x'; usize::from(len)]);
        }
        Op::Pause { end: false } => machine.pause.set(),
        _ => machine.pause.clear(),
    }
}

/// Performs operations on one function and its rings.
fn transport(machine: &Machine, op: Op) {
    match op {
        Op::Config {
            function: of,
            offset,
            value,
            len,
        } => {
            let bytes = &value.to_le_bytes()[..=usize::from(len % 4)];
            let offset = u64::from(offset) % 0x200;
            // The BAR has an operation of its own.
            if !(0x0c..0x18).contains(&offset) {
                machine.config(function(of), offset, bytes);
            }
        }
        Op::Common {
            function: of,
            register,
            value,
        } => {
            let register = u64::from(register % 60);
            let len = match register {
                20 | 21 => 1,
                16..32 | 58 => 2,
                _ => 4,
            };
            machine.write_bar(function(of), register, &value.to_le_bytes()[..len]);
        }
        Op::BringUp {
            function: of,
            features,
            queues,
        } => {
            // Most of the time every feature is accepted.
            let features = features | features.rotate_left(7) | features.rotate_left(29);
            machine.bring_up(function(of), features, queues % 3);
        }
        Op::Descriptor {
            function: of,
            queue,
            index,
            at,
            len,
            flags,
            next,
        } => {
            let (flags, next) = (u16::from(flags % 8), u16::from(next % 18));
            let entry = (u64::from(at) << 2, u32::from(len), flags, next);
            machine.descriptor(function(of), queue, u16::from(index % 16), entry);
        }
        Op::MakeAvailable {
            function: of,
            queue,
            head,
            by,
        } => {
            let (head, by) = (u16::from(head % 18), u16::from(by % 18));
            machine.make_available(function(of), queue, head, by);
        }
        Op::Kick {
            function: of,
            queue,
        } => machine.kick(function(of), queue % 3),
        Op::Msix {
            function: of,
            entry,
            address,
            data,
            control,
        } => {
            let (of, at) = (function(of), 0x4000 + 16 * u64::from(entry % 4));
            machine.write_bar(of, at, &address.to_le_bytes());
            machine.write_bar(of, at + 8, &u32::from(data).to_le_bytes());
            machine.write_bar(of, at + 12, &u32::from(control & 1).to_le_bytes());
        }
        Op::MoveBar { function: of, to } => {
            machine.move_bar(function(of), BARS + u64::from(to % 8) * BAR_SIZE);
        }
        Op::Reset { function: of } => machine.reset(function(of)),
        Op::FunctionLevelReset { function: of } => machine.function_level_reset(function(of)),
        other => access(machine, other),
    }
}

fn perform(machine: &Machine, op: Op) {
    match op {
        Op::Iommu {
            kind,
            domain,
            endpoint,
            page,
            pages,
            gpa,
            flags,
        } => machine.iommu_request(&IommuRequest {
            kind: kind % 6,
            domain: u32::from(domain % 4),
            endpoint: u32::from(endpoint % 4) << 3,
            page: u64::from(page),
            pages: u64::from(pages % 64) + 1,
            gpa: u64::from(gpa),
            flags: match kind % 6 {
                MAP => u32::from(flags % 8),
                // Most domains are not in bypass.
                _ => u32::from(flags % 16 == 1),
            },
        }),
        Op::Disk {
            queue,
            kind,
            sector,
            at,
            len,
        } => {
            let data = (u64::from(at) << 2, u32::from(len % 16) * 512);
            machine.disk_request(queue % 2, u32::from(kind % 16), u64::from(sector), data);
        }
        Op::Smmu {
            stream,
            config,
            flags,
        } => {
            let stream = u64::from(SLOTS[function(stream)]) << 3;
            machine.smmu_up(stream, u64::from(config % 8), u64::from(flags));
        }
        Op::Command {
            kind,
            stream,
            low,
            high,
        } => {
            let opcode = COMMANDS[usize::from(kind % 16)];
            let stream = match stream % 4 {
                3 => low,
                of => u32::from(SLOTS[function(of)]) << 3,
            };
            let word = opcode | u64::from(low & 0xffff) << 8 | u64::from(stream) << 32;
            machine.smmu_command([word, high]);
        }
        other => transport(machine, other),
    }
    // As each vCPU thread does after an exit.
    machine.pause.resume_deferred();
}

/// Performs the operations of both vCPUs: at the same time, or in turn.
fn run(machine: &Machine, at_once: bool, first: &[Op], second: &[Op]) {
    if at_once {
        thread::scope(|scope| {
            scope.spawn(|| second.iter().for_each(|op| perform(machine, *op)));
            first.iter().for_each(|op| perform(machine, *op));
        });
        return;
    }
    for op in in_turn(first, second) {
        perform(machine, op);
    }
}

fn in_turn(first: &[Op], second: &[Op]) -> Vec<Op> {
    let mut second = second.iter();
    let turns = first.iter().flat_map(|op| [Some(op), second.next()]);
    turns.flatten().copied().collect()
}

/// Whether threads are confined, which the first use prepares.
static CONFINED: LazyLock<bool> = LazyLock::new(|| {
    let confined = std::env::var_os("PORTCULLIS_FUZZ_SANDBOX").is_some();
    if confined {
        vmm::sandbox::prepare(Sandbox::On, None).expect("a handler of violations");
    }
    confined
});

/// Does the same as [`run`] on threads of vCPUs, which confine themselves.
fn run_confined(machine: &Arc<Machine>, at_once: bool, first: &[Op], second: &[Op]) {
    let lists = if at_once {
        vec![first.to_vec(), second.to_vec()]
    } else {
        vec![in_turn(first, second)]
    };
    let vcpus: Vec<_> = lists
        .into_iter()
        .map(|ops: Vec<Op>| {
            let machine = Arc::clone(machine);
            let work = move || ops.iter().for_each(|op| perform(&machine, *op));
            spawn(ThreadKind::Vcpu, "vcpu", work).expect("a confined thread")
        })
        .collect();
    for vcpu in vcpus {
        vcpu.join().expect("no panic");
    }
}

fuzz_target!(|input: (u8, Vec<Op>, Vec<Op>)| {
    let (choice, first, second) = input;
    let [first, second] = [&first, &second].map(|ops| &ops[..ops.len().min(MAX_OPS)]);
    IMAGE.with_borrow(|image| {
        let confined = *CONFINED;
        let machine = Arc::new(Machine::new(choice, &image.0));
        let at_once = choice & 0x80 != 0;
        if confined {
            run_confined(&machine, at_once, first, second);
        } else {
            run(&machine, at_once, first, second);
        }
        for (function, virtio) in &machine.functions {
            assert_eq!(machine.config_word(*function, 0) as u16, 0x1af4);
            virtio.check();
            if choice & 0x40 != 0 {
                machine.function_level_reset(*function);
            }
        }
        machine.works_again();
        // After this the disk's thread is between two requests.
        for (function, _) in &machine.functions {
            machine.function_level_reset(*function);
        }
        let len = std::fs::metadata(&image.0).expect("the image").len();
        assert_eq!(len, IMAGE_LEN);
    });
});
