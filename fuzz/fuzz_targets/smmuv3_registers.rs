//! An SMMUv3 with a hostile driver and a hostile device: register accesses, writes of guest memory
//! and requests in any order. A successful translation covers its request, and every stream
//! bypasses the SMMU after a reset.
#![no_main]

use std::sync::Arc;

use iommu::smmuv3::{AddressSize, Smmu, SmmuConfig, SmmuLine, SmmuWires, Stages};
use iommu::{Access, Gpa, GuestRam, Iommu, IommuRegion, Iova, Request, RequestKind, StreamId};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes as _, GuestAddress};

/// Bytes of RAM, which starts at 0 so that small numbers are addresses.
const RAM_SIZE: usize = 1 << 20;
/// Registers that a driver writes.
const REGISTERS: [u64; 24] = [
    0x20, 0x28, 0x2c, 0x44, 0x50, 0x64, 0x68, 0x70, 0x80, 0x84, 0x88, 0x90, 0x94, 0x98, 0x9c, 0xa0,
    0xa4, 0x100a8, 0x100ac, 0xb0, 0xb8, 0xc0, 0x100c8, 0x100cc,
];

struct Wires;

impl SmmuWires for Wires {
    fn pulse(&self, _: SmmuLine) {}

    fn message(&self, address: Gpa, _: u32) -> bool {
        address.0 & 1 << 20 != 0
    }
}

/// Sets up valid tables, queues and a stream table, which the input then changes.
fn prepare(smmu: &Smmu, ram: &GuestRam) {
    let put = |address: u64, value: u64| {
        ram.write_obj(value.to_le(), GuestAddress(address))
            .expect("it is RAM");
    };
    // Stream 1: a CD at 0x2000; stream 2: bypass.
    put(0x1040, 0x2000 | 0b101 << 1 | 1);
    put(0x1080, 0b100 << 1 | 1);
    put(
        0x2000,
        1 << 46 | 1 << 45 | 1 << 41 | 5 << 32 | 1 << 31 | 1 << 30 | 25,
    );
    put(0x2008, 0x3000);
    put(0x3000, 0x4003);
    put(0x4000, 0x5003);
    put(0x5008, 0x6000 | 0xc43);
    for (offset, value) in [
        (0x80, 0x1000),
        (0x88, 4),
        (0x90, 0x8000 | 4),
        (0xa0, 0x9000 | 3),
        (0xc0, 0xa000 | 3),
        (0x2c, 0xe),
        (0x50, 7),
        (0x20, 0xf),
    ] {
        smmu.write(offset, value);
    }
}

fuzz_target!(|input: (u8, Vec<(u8, u32, u64)>)| {
    let (choice, steps) = input;
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).expect("memory");
    let ram = Arc::new(ram);
    let config = SmmuConfig {
        stages: [Stages::One, Stages::Two, Stages::Nested][usize::from(choice % 3)],
        ats: choice & 0x10 != 0,
        pri: choice & 0x20 != 0,
        address_size: match choice >> 6 {
            0 => AddressSize::Bits44,
            1 => AddressSize::Bits52,
            _ => AddressSize::Bits48,
        },
    };
    let smmu = Arc::new(Smmu::new(config, ram.clone(), Arc::new(Wires)));
    let regions: Vec<_> = (0..4)
        .map(|stream| IommuRegion::new(smmu.clone(), StreamId(stream)))
        .collect();
    prepare(&smmu, &ram);
    for (kind, short, long) in steps {
        match kind % 8 {
            0 => smmu.write(REGISTERS[kind as usize / 8 % REGISTERS.len()], short),
            1 => smmu.write(u64::from(short) & 0x1_fffc, long as u32),
            2 => {
                let _ = smmu.read(u64::from(short) & 0x1_fffc);
            }
            // Any address in RAM, or one of the structures.
            3 | 4 => {
                let mask = if kind % 8 == 3 {
                    RAM_SIZE as u32 - 8
                } else {
                    0xfff8
                };
                let place = GuestAddress(u64::from(short & mask));
                ram.write_obj(long, place).expect("it is RAM");
            }
            5 | 6 => {
                let request = Request {
                    stream: StreamId(short & 3),
                    substream: (short & 4 != 0).then_some(short >> 12),
                    iova: Iova(if short & 8 != 0 { long } else { long & 0x3fff }),
                    access: if short & 16 != 0 {
                        Access::Write
                    } else {
                        Access::Read
                    },
                    kind: if short & 32 != 0 {
                        RequestKind::AtsTranslation
                    } else {
                        RequestKind::Untranslated
                    },
                };
                let _inside = regions[request.stream.0 as usize].enter();
                let looked = smmu.lookup(&request);
                let answer = smmu.translate(&request);
                assert!(answer.is_ok() || looked.is_err(), "{looked:?} {answer:?}");
                if let Ok(mapping) = answer {
                    assert!(mapping.iova.contains(request.iova));
                    assert!(mapping.perm.allows(request.access));
                    assert!(mapping.gpa.checked_add(mapping.iova.extent()).is_some());
                }
            }
            _ => smmu.set_ats_enabled(StreamId(short & 3), long & 1 != 0),
        }
    }
    let (found, _) = smmu.mappings(StreamId(1), Iova(0), 16);
    assert!(found.len() <= 16);
    smmu.restore(&smmu.save());
    smmu.reset();
    let request = Request::untranslated(StreamId(1), Iova(0x1234), Access::Read);
    assert!(
        smmu.translate(&request).is_ok(),
        "every stream passes after a reset"
    );
});
